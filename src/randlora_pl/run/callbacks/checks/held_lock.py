"""Check that the lock of a run folder is held until the training ends."""

import shlex
from pathlib import Path
from typing import Any

from filelock import SoftFileLease
from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.utils.errors import LostProcessError
from randlora_pl.utils.own_classes.imports import import_words


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
