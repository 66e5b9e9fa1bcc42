"""Common parts of all operations: dtypes inside the kernels, and sizes of tiles that the device can hold."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from randlora_pl.utils.device import INTERPRETED

_FITS: dict[tuple[Any, ...], int] = {}


def compute_type(dtype: torch.dtype) -> Any:
    """Return Triton's dtype for products of a PyTorch dtype; float32 in the interpreter, which has no bfloat16."""
    import triton.language as tl

    return tl.float32 if INTERPRETED else getattr(tl, str(dtype).removeprefix("torch."))


def precision(dtype: torch.dtype, result: torch.dtype | None = None) -> str:
    """Return Triton's ``input_precision`` of products: TF32 for narrow results, or if PyTorch may use it."""
    narrow = result in (torch.bfloat16, torch.float16)
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and (narrow or allowed) else "ieee"


def power(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """Return the power of two that holds ``size``, between two powers of two; products need 16 at least."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def first_that_fits(key: tuple[Any, ...], choices: Iterable[Any], launch: Callable[[Any], None]) -> None:
    """Launch with the first choice of tiles for which the device has registers and shared memory.

    Which one it is depends on device and shapes alone, not on timings, so that a resumed run computes the same bits.

    Args:
        key: What the choice depends on; the choice is remembered under it.
        choices: Tiles, largest first.
        launch: Runs the kernel with one of them.

    Raises:
        triton.runtime.errors.OutOfResources: Not even the last choice fits.
    """
    from triton.runtime.errors import OutOfResources

    tiles = list(choices)
    for number in range(_FITS.get(key, 0), len(tiles)):
        try:
            launch(tiles[number])
        except OutOfResources:
            if number + 1 == len(tiles):
                raise
        else:
            _FITS[key] = number
            return


def rows_first(matrix: Tensor) -> Tensor:
    """Return a matrix whose last dimension has stride 1: itself, or a copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()
