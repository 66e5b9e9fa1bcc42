"""Counter-based random numbers: every value is a pure function of (seed, stream, position).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain
64-bit integer tensor arithmetic that never overflows, so that a seed gives the same bits on a CPU
and on a GPU, in every PyTorch version, for every tensor size and in every order of evaluation.
Only `seeded` changes PyTorch's global generator, and restores it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(value: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a 32 x 32 bit product, computed in 16-bit halves to stay below 2**63."""
    low_half = (value & 0xFFFF) * multiplier
    high_half = (value >> 16) * multiplier + (low_half >> 16)
    return high_half >> 16, ((high_half & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox-4x32 with 10 rounds.

    Args:
        seed: The key; its lowest 64 bits are used.
        counter: Four int64 tensors of broadcastable shapes with values in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, uniform on [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def stream(name: str) -> int:
    """Return a 32-bit stream number for a name, so that different uses of one seed get different random numbers."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def words(seed: int, name: str, index: Tensor, part: int = 0) -> Tensor:
    """Return one uniform 32-bit word per index.

    Args:
        seed: Seed of the run.
        name: Name of the stream, for example ``"order"``.
        index: int64 tensor of any shape with values in [0, 2**63).
        part: Number of the word, in [0, 2**32), if one index needs several independent words.

    Returns:
        int64 tensor of the shape of ``index``, uniform on [0, 2**32).
    """
    fixed = [torch.tensor(value, dtype=torch.int64, device=index.device) for value in (part, stream(name))]
    return philox(seed, (index & _MASK, index >> 32, fixed[0], fixed[1]))[0]


def integers(seed: int, name: str, index: Tensor, high: int, part: int = 0) -> Tensor:
    """Return uniform integers on [0, high) by multiply and shift; ``high`` is at most 2**31."""
    return (words(seed, name, index, part) * high) >> 32


def permutation(seed: int, name: str, size: int, part: int = 0) -> Tensor:
    """Return a permutation of ``range(size)``: the stable order of one 62-bit random key per element."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, size, 1 << 14):  # small pieces stay in the processor's cache
        index = torch.arange(start, min(start + (1 << 14), size))
        pieces.append((words(seed, name, index, 2 * part) << 30) | (words(seed, name, index, 2 * part + 1) >> 2))
    return torch.argsort(torch.cat(pieces), stable=True)


@contextmanager
def seeded(word: int) -> Iterator[None]:
    """Seed PyTorch's global CPU generator inside the block, usually with one of `words`, and restore it afterwards.

    Generators of other devices are not changed. The block runs with one thread: multi-threaded sums may differ in their
    last bits, so batches of this process and of a worker would differ, too.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(word)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
