"""Tensors whose values a library keeps packed, such as torchao's weights in eight bits, and products with them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unpacks_itself(tensor: Tensor) -> bool:
    """Return True for a tensor of a library's class with packed values, such as torchao's ``Int8Tensor``.

    Its dtype is the dtype of its unpacked values, not of what it stores.
    """
    return type(tensor).dequantize is not Tensor.dequantize


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor stores: of a packed one its packed values and scales."""
    if not unpacks_itself(tensor):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # of every tensor that wraps others
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


class _Product(torch.autograd.Function):
    """``x W^T`` with a frozen packed W, which is unpacked again for the backward pass.

    The library's own product would keep the unpacked weight, so that a training would need the memory of a plain model.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        half = x.dtype == torch.float16  # in which products with whole numbers overflow before the library scales them
        return F.linear(x, weight.dequantize().to(x.dtype) if half else weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None


class PackedLinear(nn.Linear):
    """``nn.Linear`` with a packed weight, in autocast's dtype, which the library's product leaves out."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, (..., in) to (..., out)."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        output: Tensor = _Product.apply(input, self.weight)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias.to(output.dtype)
