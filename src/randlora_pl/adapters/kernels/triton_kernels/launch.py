"""Common parts of all operations: when kernels run, dtypes inside them, and sizes of tiles that the device can hold."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from randlora_pl.utils.device import INTERPRETED, forced, runs

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

    Which one it is depends on device and shapes alone, not on timings, so that a resumed run computes the same bits. It
    is remembered under the key, which has all that it depends on. The choices are in order, the largest first.

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


Function = TypeVar("Function", bound=Callable[..., Any])


def operator(name: str) -> Callable[[Function], Function]:
    """Return a decorator that makes an operator, such as ``randlora::build_weight``, which changes no argument."""
    return cast(Callable[[Function], Function], torch.library.custom_op(name, mutates_args=()))


def set_fake(made: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Set the function that gives an operator's results without data."""
    cast(Any, made).register_fake(fake)


def multiplies(tensor: Tensor, products: torch.dtype) -> bool:
    """Return True if kernels with large products run: float32 ones are left to cuBLAS unless `VARIABLE` is 1."""
    return runs(tensor, products) and (products != torch.float32 or forced())


def sums(like: Tensor, weight: Tensor | None, products: torch.dtype, dtype: torch.dtype) -> bool:
    """Return True if a kernel multiplies, sums and rounds W0 + B S to ``dtype``; not to wider ones than W0's."""
    fits = weight is None or (runs(like, weight.dtype) and weight.dtype.itemsize >= dtype.itemsize)
    return fits and multiplies(like, products) and runs(like, like.dtype, dtype)
