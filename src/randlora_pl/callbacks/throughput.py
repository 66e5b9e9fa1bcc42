"""Images or texts per second and seconds of training, across resumed runs."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

WARM_UP_BATCHES = 3
"""Batches at the start of a process that are not counted: they pay for allocation and compilation."""


class Throughput(Callback):
    """Logs ``speed/images_per_second`` (of texts ``samples``); `seconds` is the time of the whole training.

    The rate is samples over wall-clock time, waiting for data included; the first batches of a process and
    validation are left out.
    """

    def __init__(self) -> None:
        self.images = 0
        self._counted = 0.0  # seconds in which they were seen
        self._before = 0.0  # seconds of fit in the processes that this one resumes
        self._started: float | None = None
        self._last: float | None = None
        self._batches = 0

    @property
    def per_second(self) -> float | None:
        """Samples of this device per second; None before anything was counted."""
        return self.images / self._counted if self._counted else None

    @property
    def seconds(self) -> float:
        """Seconds of training, validation included, of this process and of those that it resumes."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {"images": self.images, "counted": self._counted, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the counts of the resumed run."""
        self.images, self._counted, self._before = (state_dict[key] for key in ("images", "counted", "seconds"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts one batch and the time since the one before."""
        now = time.perf_counter()
        self._batches += 1
        if self._last is not None and self._batches > WARM_UP_BATCHES:
            self.images += len(batch["weight"])
            self._counted += now - self._last
        self._last = now
        if self.per_second is not None:
            unit = getattr(getattr(trainer, "datamodule", None), "unit", "images")
            pl_module.log(f"speed/{unit}_per_second", self.per_second, batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The time of a validation is not training."""
        self._last = time.perf_counter() if self._last is not None else None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._before, self._started = self.seconds, None
