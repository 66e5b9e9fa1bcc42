"""SIGTERM, as batch systems send it before they kill: the optimizer step at hand is finished and saved."""

import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Termination(Callback):
    """Keeps SIGTERM back until the end of an optimizer step, where a checkpoint can be written.

    Lightning ends a training after the micro-batch, and the gradient of a step that is not finished cannot be saved.
    Runs of several processes are left as they are: the signal comes to each at another time.
    """

    def __init__(self) -> None:
        self._within = False  # an optimizer step
        self._kept: Callable[[], None] | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stands before Lightning's own handler, which Lightning removes at the end of the run with this one."""
        self._within, self._kept, self._step = False, None, trainer.global_step
        theirs: Any = signal.getsignal(signal.SIGTERM)
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread() or not callable(theirs):
            return

        def handler(number: int, frame: Any) -> None:
            if self._within:
                self._kept = lambda: theirs(number, None)
            else:
                theirs(number, frame)

        signal.signal(signal.SIGTERM, handler)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the step must be finished."""
        self._within = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hands over what came during the step; `AdapterCheckpoint`, which comes later, saves and Lightning ends."""
        if trainer.global_step == self._step:
            return
        self._step, self._within = trainer.global_step, False
        if self._kept is not None:
            self._kept()
