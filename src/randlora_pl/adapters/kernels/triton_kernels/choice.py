"""Choice between Triton's kernels and PyTorch's operators, which stay the reference.

Triton runs on CUDA devices from compute capability 8.0, if it is installed; CUDA builds of PyTorch bring it. It is
imported when the first kernel runs, not earlier.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.launch import interpreted
from randlora_pl.utils.device import on_cuda
from randlora_pl.utils.errors import UserError

VARIABLE = "RANDLORA_PL_TRITON"
"""0: PyTorch's operators only; 1: kernels wherever they can run, also in the interpreter. Default: by device."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 128
"""Largest side of the orthogonal factors H and O of structured bases that a kernel holds in registers."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def setting() -> str:
    """Return the value of `VARIABLE`: ``auto``, ``0`` or ``1``.

    Raises:
        UserError: It is something else, or it is 1 and triton is not installed.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in ("auto", "0", "1"):
        raise UserError(f"{VARIABLE} is {value!r}. Set 0 or 1, or unset it: then the device decides.")
    if value == "1" and not installed():
        raise UserError(f"{VARIABLE} is 1, but triton is not installed. Run `pip install triton`, or unset {VARIABLE}.")
    return value


@functools.cache
def installed() -> bool:
    """Return True if triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _able(index: int | None) -> bool:
    """Return True if a device has the instructions; True for devices that are only traced."""
    return not torch.cuda.is_available() or bool(torch.cuda.get_device_capability(index) >= (8, 0))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_on(kind: str, index: int | None) -> bool:
    if interpreted():
        return bool(setting() == "1")
    return setting() != "0" and installed() and kind == "cuda" and _able(index)


def runs(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Return True if kernels run for a tensor on its device and in these dtypes."""
    if not (interpreted() or on_cuda(tensor)):
        return False
    able: bool = _runs_on(tensor.device.type, tensor.device.index)
    return able and all(dtype in _FLOATS for dtype in dtypes)


def multiplies(tensor: Tensor, products: torch.dtype) -> bool:
    """Return True if kernels with large products run: float32 ones are left to cuBLAS unless `VARIABLE` is 1."""
    return runs(tensor, products) and (products != torch.float32 or setting() == "1")


def holds(block: int, blocks: int) -> bool:
    """Return True if kernels can hold H (b, b) and O (m, m) of structured bases."""
    return max(block, blocks) <= _LARGEST
