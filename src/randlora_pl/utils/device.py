"""Devices of tensors: the choice of an implementation, and asynchronous copies to the host.

Triton's kernels run on CUDA devices from compute capability 8.0, if it is installed; CUDA builds of PyTorch bring it.
It is imported when the first kernel runs, not earlier. PyTorch's operators stay the reference.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from randlora_pl.utils.errors import UserError

VARIABLE = "RANDLORA_PL_TRITON"
"""0: PyTorch's operators only; 1: kernels wherever they can run, also in the interpreter. Default: by device."""

VALUE = os.environ.get(VARIABLE) or "auto"
"""Value of `VARIABLE`."""

INSTALLED = importlib.util.find_spec("triton") is not None
"""True if triton can be imported."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True if kernels run in Triton's interpreter, on a CPU; the variable has to be set before triton is imported."""

_as_on_cuda = False


def on_cuda(tensor: Tensor) -> bool:
    """Return True if a tensor is on a CUDA device, or if `choose_as_on_cuda` is active.

    Every choice between an implementation for CUDA and one for a CPU asks this function.
    """
    return _as_on_cuda or tensor.is_cuda


@contextmanager
def choose_as_on_cuda() -> Iterator[None]:
    """Choose the implementations for CUDA on other devices too, to count or test them without a GPU.

    For the whole process, as kernels of the backward pass may run in another thread.
    """
    global _as_on_cuda
    before, _as_on_cuda = _as_on_cuda, True
    try:
        yield
    finally:
        _as_on_cuda = before


def forced() -> bool:
    """Return True if `VARIABLE` is 1.

    Raises:
        UserError: It is set to something else than 0 and 1, or it is 1 and triton is not installed.
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


class LateCopy:
    """Copy of a tensor on the host, which arrives while both host and device do other work.

    On other devices than CUDA, the copy is made at once.

    Args:
        values: Tensor of any shape; later changes of it do not change the copy.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: Any = None
        if not on_cuda(values):
            self._values: Tensor = values.detach().clone().cpu()
            return
        self._values = values.detach().to("cpu", non_blocking=True, copy=True)  # PyTorch pins its memory
        if values.device.type != "cpu":
            self._event = torch.get_device_module(values.device).Event()
            self._event.record()

    @property
    def arrived(self) -> bool:
        """True if `read` returns at once."""
        return self._event is None or bool(self._event.query())

    def read(self) -> Tensor:
        """Return the copy, after waiting for it if it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
