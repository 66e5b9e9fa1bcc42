"""The lock of a run folder must be held until the training ends."""

import shlex
from pathlib import Path
from typing import Any

from filelock import SoftFileLease
from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.utils.errors import LostProcessError


class HeldLock(Callback):
    """Ends a training whose lock was lost: another process may be training in its folder.

    That happens to a process that was stopped, or cut off from the disk, for longer than its lease.

    Args:
        lease: The lock.
        folder: The run folder.
    """

    def __init__(self, lease: SoftFileLease, folder: Path) -> None:
        self._lease, self._folder = lease, folder

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stands before `AdapterCheckpoint`, so that nothing is written any more.

        Raises:
            LostProcessError: The lock is lost.
        """
        if lost := self._lease.compromise:
            resume = f"go on with: randlora-pl fit --resume {shlex.quote(str(self._folder))}"
            raise LostProcessError(
                f"the lock of its folder ({lost.reason}): see if another one trains there, or {resume}"
            )
