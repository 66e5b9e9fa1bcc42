"""Copy of a few numbers from the device to the host, for which the host does not wait."""

from typing import Any

import torch
from torch import Tensor

from randlora_pl.utils.device import on_cuda


class LateCopy:
    """Copy of a tensor on the host, which arrives while both host and device do other work.

    On other devices than CUDA, the copy is made at once.

    Args:
        values: Tensor of any shape; later changes of it do not change the copy.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: Any = None
        if not on_cuda(values):
            self._values = values.detach().clone().cpu()
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
