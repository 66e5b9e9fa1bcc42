"""Peak memory: allocated by PyTorch on a GPU, resident set of the process on a CPU."""

import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far in bytes.

    Args:
        device: Device of the model. CUDA: peak of PyTorch's allocator since the last reset. Others: peak resident set
            of the process since it started, or since Linux reset the counter, as before each trial of a sweep.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not available on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


class PeakMemory(Callback):
    """Log ``memory/peak_mb`` (10^6 bytes) during training; `peak` is the peak of the whole run."""

    def __init__(self) -> None:
        self._before = 0
        self._here = 0

    @property
    def peak(self) -> int:
        """Peak in bytes of this process and the processes it resumes."""
        return max(self._before, self._here)

    def state_dict(self) -> dict[str, Any]:
        """Return the peak so far."""
        return {"peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the peak of the resumed run."""
        self._before = state_dict["peak"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the peak on a GPU."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log the peak so far at the steps that are logged; on a GPU reading it takes 0.1 ms."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self._here or (every and trainer.global_step % every == 0):
            self._here = peak_bytes(pl_module.device)
        pl_module.log("memory/peak_mb", torch.tensor(self._here / 1e6), batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the peak a last time."""
        self._here = peak_bytes(pl_module.device)
