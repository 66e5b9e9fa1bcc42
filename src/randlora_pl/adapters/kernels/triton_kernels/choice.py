"""Choice between Triton's kernels and PyTorch's operators, which stay the reference.

Triton runs on CUDA devices from compute capability 8.0, if it is installed; CUDA builds of PyTorch bring it. It is
imported when the first kernel runs, not earlier.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.launch import INTERPRETED
from randlora_pl.utils.device import on_cuda
from randlora_pl.utils.errors import UserError

VARIABLE = "RANDLORA_PL_TRITON"
"""0: PyTorch's operators only; 1: kernels wherever they can run, also in the interpreter. Default: by device."""

VALUE = os.environ.get(VARIABLE) or "auto"
"""Value of `VARIABLE`."""

INSTALLED = importlib.util.find_spec("triton") is not None
"""True if triton can be imported."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 128
"""Largest side of the orthogonal factors H and O of structured bases that a kernel holds in registers."""


def forced() -> bool:
    """Return True if `VARIABLE` is 1.

    Raises:
        UserError: It is something else than 0 and 1, or it is 1 and triton is not installed.
    """
    if VALUE not in ("auto", "0", "1"):
        raise UserError(f"{VARIABLE} is {VALUE!r}. Set 0 or 1, or unset it: then the device decides.")
    if VALUE == "1" and not INSTALLED:
        raise UserError(f"{VARIABLE} is 1, but triton is not installed. Run `pip install triton`, or unset {VARIABLE}.")
    return VALUE == "1"


def _able(device: torch.device) -> bool:
    """Return True if kernels run on a device. A GPU that is not there, but only traced, has PyTorch for CUDA."""
    major = None
    if device.type == "cuda":  # asked several times by each layer, and the driver takes its time
        major = _major.__wrapped__(device.index) if torch.compiler.is_compiling() else _major(device.index)
        if major is None:
            return True
    if INTERPRETED or major is None:
        return INTERPRETED and forced()
    return INSTALLED and major >= 8


@functools.cache
def _major(index: int | None) -> int | None:
    """Return the compute capability's first number of a GPU, or None without any."""
    return int(torch.cuda.get_device_properties(index).major) if torch.cuda.is_available() else None


def runs(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Return True if kernels run for a tensor on its device and in these dtypes."""
    asked = forced() or (VALUE != "0" and on_cuda(tensor))
    return asked and _able(tensor.device) and all(dtype in _FLOATS for dtype in dtypes)


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
