"""Peak memory: what the allocator handed out on a GPU, the resident set of the process on a CPU."""

import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far in bytes.

    Args:
        device: Where the model is. CUDA: the most that PyTorch's allocator held since the last reset.
            Others: the largest resident set of the process since it started, or since Linux was told to count anew,
            as before each cell of a sweep.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows has no such figure
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


class PeakMemory(Callback):
    """Logs ``memory/peak_bytes`` during the training; `peak` is the figure of the whole run."""

    def __init__(self) -> None:
        self._before = 0
        self._here = 0

    @property
    def peak(self) -> int:
        """The largest figure of this process and of those that it resumes."""
        return max(self._before, self._here)

    def state_dict(self) -> dict[str, Any]:
        """The peak so far."""
        return {"peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the peak of the resumed run."""
        self._before = state_dict["peak"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts from here on a GPU."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the peak so far."""
        self._here = peak_bytes(pl_module.device)
        pl_module.log("memory/peak_bytes", float(self._here), batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the last figure."""
        self._here = peak_bytes(pl_module.device)
