"""Parts of the products of all methods: rounding to bfloat16, dropout, and the cheapest form of a layer's product.

Rounding of W0 + delta to bfloat16 loses no update, however small.
A bfloat16 weight has 8 significant bits. If W0 + delta is rounded to the nearest one, it is W0 again wherever delta is
below half of W0's last bit: 28 % of an update of 0.05 % of W0 survive. Here each entry has a threshold, a hash of its
index. An entry is rounded away from zero if the cut-off fraction exceeds the threshold, so that the fractions that are
lost and gained cancel over the entries. The result

- is exactly W0 for a zero update, because the 16 bits that are cut off are zero then;
- is the same on every device, in every process and after a resume;
- has the same error as a float32 W0 that is rounded after the sum, whose lower bits are as good as random.

In a kernel, for the entry with flat index i of (out, in): take the float32 bits of W0 + delta, add twice the threshold
of i, shift right by 16.

Products in float16 have a power of two between B and S, so that a small S does not become zero: the smallest positive
number is 6e-8, and in the first steps from a zero lambda or gamma all of S is smaller. S is multiplied by 2^12 before
it is rounded, and the copies of B by 2^-12. This is exact for entries of +-1, and changes others by at most 1.2e-4,
less than the rounding of an entry near 1. Products are the same. Gradients of lambda and gamma get the factor back in
float32. They need the loss scale of ``16-mixed``, as all gradients in float16 do. Output gradients of 1e-5 after that
scale lose precision: an error of 2 % in gamma's gradient, 0.2 % at 1e-4. The range: S, and tokens or scaled gradients
times S, up to 16 instead of 65,504. An update of the size of its weight has an S of 0.01. Beyond the range gradients
are infinite, and the loss scale falls as at every overflow.

On a CPU `torch.nn.functional.dropout` of a layer's wide side takes nearly as long as a product of the layer, more
than half of it for random numbers. Here one 64-bit random number decides on four entries.

Building the update as a matrix, added to the frozen weight, has a fixed cost. Multiplying tokens by its thin factors
has a cost per token. So few tokens use the factors, many use the built weight. The rules count multiplications only.
`built_again` applies a built weight that is not kept for the backward pass.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora_pl.utils.device import on_cuda

_CACHE: dict[torch.device, Tensor] = {}


def added(weight: Tensor, delta: Tensor) -> Tensor:
    """Return W0 + delta in the dtype of W0; in bfloat16, no part of delta is lost on average."""
    if weight.dtype != torch.bfloat16:
        return weight + delta.to(weight.dtype)
    return rounded(weight + delta.float(), weight.dtype)


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix in another dtype; from float32 to bfloat16 by thresholds, with the gradient of a plain cast."""
    if dtype != torch.bfloat16 or total.dtype != torch.float32:
        return total.to(dtype)
    if not (torch.is_grad_enabled() and total.requires_grad):
        return _round(total)
    result: Tensor = _Round.apply(total)  # type: ignore[no-untyped-call, unused-ignore]
    return result


def _round(total: Tensor) -> Tensor:
    bits = torch.add(total.view(torch.int32), _thresholds_like(total), alpha=2)
    whole = bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    return whole.masked_fill_(total.isnan(), math.nan)  # a GPU's NaN would overflow to the bits of zero


class _Round(torch.autograd.Function):
    """`rounded`, straight through for the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(total: Tensor) -> Tensor:
        return _round(total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].float()


def thresholds(count: int, device: torch.device) -> Tensor:
    """Return the hashes of the indices below ``count``: int16, uniform on [0, 2^15).

    Two rounds of a multiplicative hash in int32, whose products wrap.
    """
    words = torch.arange(count, dtype=torch.int32, device=device) * -1640531535
    words = (words ^ (words >> 15)) * -2048144777
    return ((words ^ (words >> 13)) & 0x7FFF).to(torch.int16)


def _thresholds_like(matrix: Tensor) -> Tensor:
    """Return the thresholds of a matrix's entries: a view of one tensor per device, as large as the largest matrix."""
    count, device = matrix.numel(), matrix.device
    if torch.compiler.is_compiling() or matrix.is_meta or type(matrix) is not Tensor:  # fused, or not real
        return thresholds(count, device).view(matrix.shape)
    if device not in _CACHE or len(_CACHE[device]) < count:
        with torch.inference_mode(False), torch.no_grad():
            made = thresholds(count, device)
        if type(made) is not Tensor:  # a mode that traces
            return made.view(matrix.shape)
        _CACHE[device] = made
    return _CACHE[device][:count].view(matrix.shape)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of this tensor: autocast's if enabled, except for float64."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64:  # autocast does not change it
        return tensor.dtype
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    return torch.get_autocast_dtype(kind) if on else tensor.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast, around products that have their dtype already."""
    kind = tensor.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


POWER = 2.0**12


def enlarged(dtype: torch.dtype) -> tuple[float, ...]:
    """Return the further factor of S in products of this dtype, as a part of `Form.scales`."""
    return (POWER,) if dtype == torch.float16 else ()


def shrunk(b: torch.Tensor) -> torch.Tensor:
    """Return a new copy of B, or of a factor of it, with the inverse factor of `enlarged`, in place."""
    return b.mul_(1 / POWER) if b.dtype == torch.float16 else b


AT_ONCE = 512
"""Tokens per chunk on a CPU: a few megabytes, which fit into its cache."""

_STEPS = 1 << 16


def in_parts(tokens: Tensor, each: int = 1) -> Iterator[slice]:
    """Return slices of the first dimension (at least one) for chunked processing; one slice on a GPU.

    An entry of the first dimension has ``each`` tokens.
    """
    if tokens.device.type != "cpu" or on_cuda(tokens) or torch.compiler.is_compiling():
        return iter((slice(None),))  # a loop would be recompiled for every number of tokens
    step = max(1, AT_ONCE // max(1, each))
    return (slice(start, start + step) for start in range(0, max(1, tokens.shape[0]), step))


def drop_mask(x: Tensor, probability: float) -> Tensor:
    """Return a random mask of the entries of ``x`` to drop: bool, of its shape.

    On a CPU the probability is rounded to a multiple of 1/65536 if that changes it by less than a hundredth;
    `keep_scaling` uses the rounded value.
    """
    threshold = _threshold(x, probability)
    if threshold is None and torch.compiler.is_compiling():
        return torch.rand(x.shape, device=x.device) < probability
    if threshold is None:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(probability)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    entries = mask.view(-1)
    step = AT_ONCE * max(1, x.shape[-1] if x.ndim else 1)
    for start in range(0, entries.numel(), step):
        some = entries[start : start + step]
        words = torch.empty(-(-len(some) // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        torch.lt(words.view(torch.int16)[: len(some)], threshold - _STEPS // 2, out=some)
    return mask


def keep_scaling(x: Tensor, probability: float) -> float:
    """Return the factor that preserves the expected value of ``x`` with `drop_mask`."""
    threshold = _threshold(x, probability)
    return 1 / (1 - (probability if threshold is None else threshold / _STEPS))


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` with zeros where the mask is True; ``x`` itself without a mask."""
    return x if mask is None else x.masked_fill(mask, 0)


def dropped(x: Tensor, probability: float) -> Tensor:
    """Return ``x`` with dropout, scaled to preserve the expected value."""
    if _threshold(x, probability) is None:
        return nn.functional.dropout(x, probability)
    return (x * keep_scaling(x, probability)).masked_fill_(drop_mask(x, probability), 0)


def _threshold(x: Tensor, probability: float) -> int | None:
    """Return how many of 65,536 values drop an entry; None to use PyTorch's own dropout."""
    threshold = round(probability * _STEPS)
    coarse = not 100 <= threshold <= _STEPS - 100
    plain = x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    vmapped = torch._C._functorch.maybe_current_level() is not None  # vmap has its own randomness rules
    if coarse or not plain or on_cuda(x) or vmapped:
        return None
    return threshold


def builds(tokens: int, rank: int, weight: Tensor, trains: bool) -> bool:
    """Return True if W0 + P Q takes fewer multiplications than two thin products next to the frozen layer.

    In training, P Q and the thin products each have two products of equal cost in the backward pass, and a built weight
    has a gradient of its size.
    """
    out_features, in_features = weight.shape
    built, thin = rank * out_features * in_features, tokens * rank * (out_features + in_features)
    return 3 * built + tokens * out_features * in_features < 3 * thin if trains else built < thin


class Choice(NamedTuple):
    """Cheaper form of a product.

    Attributes:
        build: True to build W0 + B S.
        project: True to compute tokens B first.
    """

    build: bool
    project: bool


def cheapest(tokens: int, large: int, small: int, inner: int, width: int, uses: int = 1) -> Choice:
    """Return the form with the fewest multiplications for a product with W0 + B S.

    Args:
        tokens: T.
        large: D.
        small: d.
        inner: Size of a projected token: n r, or d for structured bases.
        width: Multiplications per value that B is applied to: n r, or the block size of structured bases.
        uses: Products with one built W0 + B S.
    """
    build = large * small * width
    through = tokens * (large * width + inner * small)
    return Choice(build < uses * through, through < build + tokens * large * small)


def cheapest_alone(tokens: int, large: int, small: int, inner: int, width: int, trains: bool) -> Choice:
    """Return the form with the fewest multiplications for ``x B S`` without a W0, summed over all passes in training.

    The outputs and the two gradients each cost D d width + T D d with a built B S. With B and S separately they cost
    T (D width + inner d), but two of the three share a projection: both gradients share the projection of the outputs'
    gradient, or the outputs and S's gradient share the projection of the inputs. ``trains`` is True if gradients are
    needed; the other arguments are as of `cheapest`.
    """
    build = large * small * (width + tokens)
    thick, thin = tokens * large * width, tokens * inner * small
    through = 2 * thick + 3 * thin < 3 * build if trains else thick + thin < build
    return Choice(not through, through)


# Achieved rates of an H100, of which only the ratios matter: multiplications and bytes a second, seconds a kernel.
_MULTIPLICATIONS, _BYTES, _KERNEL = 300e12, 2.75e12, 2.5e-6


def product_time(tokens: int, large: int, small: int) -> float:
    """Return the seconds that a layer's three products of an adapted weight take on a GPU."""
    return 3 * tokens * large * small / _MULTIPLICATIONS


def build_time(large: int, small: int, width: int, structured: bool) -> float:
    """Return the seconds that building W0 + B S takes on a GPU: its multiplications, and its bytes or its kernels.

    An entry of W0 is read and written twice in 16 bits; an entry of S is written and read in float32, with structured
    bases also turned and mixed.
    """
    rows, stack, kernels = (small, 32, 12) if structured else (width, 12, 6)
    moved = (8 * large * small + stack * rows * small) / _BYTES
    return large * small * width / _MULTIPLICATIONS + max(moved, kernels * _KERNEL)


def built_again(x: Tensor, build: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """Apply ``F.linear`` with the weight that ``build`` returns, (..., in) to (..., out).

    The backward pass calls ``build`` again, so that no layer keeps a matrix of its weight's size. The product is not
    repeated.
    """

    def product(x: Tensor) -> Tensor:
        return nn.functional.linear(x, build(), bias)

    output: Tensor = checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
    return output
