"""Cost of a training: peak memory, samples per second and seconds, across resumed runs."""

import sys
import time
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


WARM_UP_BATCHES = 3
"""Batches at the start of a process that are not counted, because they include allocation and compilation."""


class Throughput(Callback):
    """Log ``speed/images_per_second`` (``samples`` for texts); `seconds` is the time of the whole training.

    The rate is samples per wall-clock time, including waits for data; the first batches of a process and validation
    are excluded.
    """

    def __init__(self) -> None:
        self.images = 0
        self._counted = 0.0  # seconds of the counted batches
        self._before = 0.0  # seconds of training in earlier processes of the run
        self._started: float | None = None
        self._last: float | None = None
        self._batches = 0

    @property
    def per_second(self) -> float | None:
        """Samples per second on this device; None before any batch is counted."""
        return self.images / self._counted if self._counted else None

    @property
    def seconds(self) -> float:
        """Seconds of training, including validation, of this process and the processes it resumes."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far."""
        return {"images": self.images, "counted": self._counted, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts of the resumed run."""
        self.images, self._counted, self._before = (state_dict[key] for key in ("images", "counted", "seconds"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count one batch and the time since the previous one."""
        now = time.perf_counter()
        self._batches += 1
        if self._last is not None and self._batches > WARM_UP_BATCHES:
            self.images += len(batch["weight"])
            self._counted += now - self._last
        self._last = now
        if self.per_second is not None:
            unit = getattr(getattr(trainer, "datamodule", None), "unit", "images")
            pl_module.log(f"speed/{unit}_per_second", torch.tensor(self.per_second), batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude the time of a validation."""
        self._last = time.perf_counter() if self._last is not None else None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._before, self._started = self.seconds, None
