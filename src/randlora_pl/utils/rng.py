"""Counter-based random numbers: every value is a pure function of (seed, stream, position).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain
64-bit integer tensor arithmetic that never overflows, so that a seed gives the same bits on a CPU
and on a GPU, in every PyTorch version, for every tensor size and in every order of evaluation.
Nothing here touches PyTorch's global generator, but `seeded`, which puts it back.
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
    """High and low 32 bits of a 32 x 32 bit product, in two 16-bit halves to stay below 2**63."""
    low_half = (value & 0xFFFF) * multiplier
    high_half = (value >> 16) * multiplier + (low_half >> 16)
    return high_half >> 16, ((high_half & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 with 10 rounds.

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
    """A 32-bit stream number from a name, so that uses of one seed do not share random numbers."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def words(seed: int, name: str, index: Tensor, part: int = 0) -> Tensor:
    """One uniform 32-bit word for each index.

    Args:
        seed: The user's seed.
        name: What the numbers are for, for example ``"order"``.
        index: int64 tensor of any shape with values in [0, 2**63).
        part: Distinguishes several independent words for one index, in [0, 2**32).

    Returns:
        int64 tensor of the shape of ``index``, uniform on [0, 2**32).
    """
    fixed = [torch.tensor(value, dtype=torch.int64, device=index.device) for value in (part, stream(name))]
    return philox(seed, (index & _MASK, index >> 32, fixed[0], fixed[1]))[0]


def integers(seed: int, name: str, index: Tensor, high: int, part: int = 0) -> Tensor:
    """Uniform integers on [0, high) by multiply and shift; ``high`` is at most 2**31."""
    return (words(seed, name, index, part) * high) >> 32


def permutation(seed: int, name: str, size: int, part: int = 0) -> Tensor:
    """A permutation of ``range(size)``: the stable order of one 62-bit random key for each element."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, size, 1 << 14):  # small pieces stay in the processor's cache
        index = torch.arange(start, min(start + (1 << 14), size))
        pieces.append((words(seed, name, index, 2 * part) << 30) | (words(seed, name, index, 2 * part + 1) >> 2))
    return torch.argsort(torch.cat(pieces), stable=True)


@contextmanager
def seeded(word: int) -> Iterator[None]:
    """Let code that draws from PyTorch's global CPU generator draw from one with this seed instead.

    Afterwards the generator is as before; those of other devices are left alone. One thread computes: sums that several
    threads share may differ in their last bits, and so would batches made in this process and in a worker.

    Args:
        word: The seed, as a rule of `words`.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(word)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
