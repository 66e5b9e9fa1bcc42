"""Devices of tensors: the choice of an implementation, and copies to the host for which it does not wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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


class LateCopy:
    """Copy of a tensor on the host, which arrives while both host and device do other work.

    On other devices than CUDA, the copy is made at once.

    Args:
        values: Tensor of any shape; later changes of it do not change the copy.
    """

    def __init__(self, values: "Tensor") -> None:
        import torch

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

    def read(self) -> "Tensor":
        """Return the copy, after waiting for it if it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
