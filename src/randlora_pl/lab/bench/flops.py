"""Floating point operations of a step, counted, and what the machine does at best."""

import math
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_SIDE = {"cpu": 2048, "cuda": 8192}
_LEAST = 0.2  # seconds that the products of one measurement take at least


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of scores and of their product with the values: (batch, heads, length, width) each."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward(
    _: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any
) -> int:
    """Return the scores once more, then two products for the weights and the values and two for query and key."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (3 * width + 2 * value[3])


def _added(_: torch.Size, left: torch.Size, right: torch.Size, *__: Any, **___: Any) -> int:
    """Return a product (or a batch of them) that is added to something in place."""
    return 2 * math.prod(left) * right[-1]


def counter() -> FlopCounterMode:
    """Count the products of matrices, convolutions and attention inside a ``with`` block, backward passes included.

    Operations are counted as they reach the device, so that operations of custom autograd functions are in;
    element by element ones are not.
    """
    aten = torch.ops.aten
    omitted = {  # by PyTorch: fused attention on CPUs, and in-place added products
        aten.addmm_: _added,
        aten.baddbmm_: _added,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=omitted)


class Gemm:
    """A product of two large square matrices, whose speed stands for the peak of the machine.

    Args:
        side: Rows and columns, by default as many as the device likes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, side: int | None = None) -> None:
        self.side = side or _SIDE.get(device.type, 2048)
        self.device, self.dtype = device, dtype

    def rate(self) -> float:
        """Return the operations per second, the mean over a fifth of a second or longer."""
        matrix = torch.randn(self.side, self.side, device=self.device).to(self.dtype)  # gone before anything else runs
        result = torch.mm(matrix, matrix)
        synchronize(self.device)
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < _LEAST:
            torch.mm(matrix, matrix, out=result)
            synchronize(self.device)
            count += 1
        return 2 * self.side**3 * count / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
