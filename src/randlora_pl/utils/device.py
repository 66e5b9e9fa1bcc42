"""Choice of an implementation by the device of a tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_as_on_cuda = False


def on_cuda(tensor: "Tensor") -> bool:
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
