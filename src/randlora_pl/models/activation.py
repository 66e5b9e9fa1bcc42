"""QuickGELU, x sigmoid(1.702 x), by few kernels: ``quick_gelu``, and ``randlora::quick_gelu_backward`` in Triton."""

from typing import Any

import torch
from torch import Tensor

from randlora_pl.utils import device

aten: Any = torch.ops.aten
SCALE = 1.702
_NO_THRESHOLD = 80.0  # sigmoid(80) is 1 in float32, and exp(80) is finite
_LEAST = 1 << 24
"""Entries from which the memory traffic that Triton's kernel saves takes longer than its launch."""


@torch.library.custom_op("randlora::quick_gelu_backward", mutates_args=())
def quick_gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Return ``gradient s (1 + z (1 - s))`` for z = 1.702 x and s = sigmoid(z), computed in float32.

    Args:
        gradient: Gradient of the result, of the shape of x.
        x: Input of the activation.
    """
    from randlora_pl.models.activation_jit import BLOCK, backward_kernel

    x, gradient = x.contiguous(), gradient.contiguous()
    out = torch.empty_like(x)
    backward_kernel[(-(-x.numel() // BLOCK),)](out, gradient, x, x.numel(), SCALE=SCALE, num_warps=4)
    return out


@quick_gelu_backward.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _runs_kernel(x: Tensor) -> bool:
    """Return True if the kernel runs and saves time."""
    return x.numel() >= _LEAST and device.runs(x, x.dtype)


class _QuickGELU(torch.autograd.Function):
    """QuickGELU by kernels that PyTorch has for other functions; keeps only its input.

    The gradient of softplus is g sigmoid(beta x), which is QuickGELU for g = x. The gradient of SiLU,
    g s(z) (1 + z (1 - s(z))), is QuickGELU's for z = 1.702 x. Both compute in float32 and round once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        result: Tensor = aten.softplus_backward(x, x, SCALE, _NO_THRESHOLD)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # neither kernel can be derived once more
            scaled = x * SCALE
            share = scaled.sigmoid()
            slope: Tensor = share * (1 + scaled * (1 - share))
            return gradient * slope
        kernel = _runs_kernel(x)
        result: Tensor = quick_gelu_backward(gradient, x) if kernel else aten.silu_backward(gradient, x * SCALE)
        return result


def quick_gelu(x: Tensor) -> Tensor:
    """Compute QuickGELU in one kernel, and its gradient in one or two.

    Written out, it is three kernels and six for the gradient, and keeps three tensors for the backward pass.

    Args:
        x: Any shape and floating dtype.

    Returns:
        A tensor of the same shape and dtype.
    """
    result: Tensor = _QuickGELU.apply(x)  # type: ignore[no-untyped-call, unused-ignore]
    return result
