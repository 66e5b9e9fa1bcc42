"""Rounding of W0 + delta to bfloat16 that loses no update, however small.

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
"""

import math
from typing import Any

import torch
from torch import Tensor

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


POWER = 2.0**12


def enlarged(dtype: torch.dtype) -> tuple[float, ...]:
    """Return the further factor of S in products of this dtype, as a part of `Form.scales`."""
    return (POWER,) if dtype == torch.float16 else ()


def shrunk(b: torch.Tensor) -> torch.Tensor:
    """Return a new copy of B, or of a factor of it, with the inverse factor of `enlarged`, in place."""
    return b.mul_(1 / POWER) if b.dtype == torch.float16 else b
