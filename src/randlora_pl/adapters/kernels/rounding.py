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
