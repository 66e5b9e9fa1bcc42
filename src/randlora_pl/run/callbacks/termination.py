"""Ends of a training from outside: SIGTERM of a batch system, and a lost lock of the run folder."""

import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import SoftFileLease
from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.utils.errors import LostProcessError
from randlora_pl.utils.own_classes import import_words


class Termination(Callback):
    """Delay SIGTERM until the end of an optimizer step, when a checkpoint can be written.

    Lightning ends a training after the current micro-batch, but the gradients of an unfinished step cannot be saved.
    Runs with several processes are not changed: the signal reaches each process at a different time.
    """

    def __init__(self) -> None:
        self._within = False  # True within an optimizer step
        self._kept: Callable[[], None] | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap Lightning's handler; Lightning removes both at the end of the run."""
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
        """Start to delay the signal until the step is finished."""
        self._within = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Pass on a signal received during the step; `AdapterCheckpoint` then saves and Lightning ends."""
        if trainer.global_step == self._step:
            return
        self._step, self._within = trainer.global_step, False
        if self._kept is not None:
            self._kept()


class HeldLock(Callback):
    """End a training that lost its lock, because another process may train in its folder.

    A process loses the lock when it is suspended or loses the disk for longer than its lease.

    Args:
        lease: Lock of the run folder.
        folder: Run folder.
    """

    def __init__(self, lease: SoftFileLease, folder: Path) -> None:
        self._lease, self._folder = lease, folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Check the lock before `AdapterCheckpoint` runs, so that nothing more is written.

        Raises:
            LostProcessError: The lock is lost.
        """
        if lost := self._lease.compromise:
            resume = f"resume with: randlora-pl fit --resume {shlex.quote(str(self._folder))}{import_words()}"
            raise LostProcessError(
                f"the lock of its folder ({lost.reason}): check whether another process trains there, or {resume}"
            )
