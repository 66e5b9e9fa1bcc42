"""Choice of kernels for products and sums, by the rules of `utils.device`."""

import torch
from torch import Tensor

from randlora_pl.utils.device import forced, runs

_LARGEST = 128
"""Largest side of the orthogonal factors H and O of structured bases that a kernel holds in registers."""


def multiplies(tensor: Tensor, products: torch.dtype) -> bool:
    """Return True if kernels with large products run: float32 ones are left to cuBLAS unless `VARIABLE` is 1."""
    return runs(tensor, products) and (products != torch.float32 or forced())


def sums(like: Tensor, weight: Tensor | None, products: torch.dtype, dtype: torch.dtype) -> bool:
    """Return True if a kernel multiplies, sums and rounds W0 + B S to ``dtype``; not to wider ones than W0's."""
    fits = weight is None or (runs(like, weight.dtype) and weight.dtype.itemsize >= dtype.itemsize)
    return fits and multiplies(like, products) and runs(like, like.dtype, dtype)


def holds(block: int, blocks: int) -> bool:
    """Return True if kernels can hold H (b, b) and O (m, m) of structured bases."""
    return max(block, blocks) <= _LARGEST
