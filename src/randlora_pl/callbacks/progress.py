"""Progress bar of the training, which is a single Lightning epoch."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from randlora_pl.utils.device import LateCopy

_SHOWN = ("train/loss", "train/acc")


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, labeled `Training` and without the logger's version.

    It shows loss and accuracy of an optimizer step when they have arrived on the host, so that a GPU never waits for
    the bar. Lightning's bars, which need ``prog_bar=True``, wait for each step.

    Attributes:
        reads_metrics: True, so that tasks do not pass it the metrics of the training.
    """

    reads_metrics = True

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=True)  # a second; the end of a stage waits for one refresh
        self._coming: tuple[list[str], LateCopy] | None = None
        self._here: dict[str, float] = {}

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the metrics of the last step."""
        self._coming = None
        self._read(trainer, wait=True)
        super().on_train_epoch_end(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics shown beside the bar."""
        self._read(trainer)
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return self._here | items

    def _read(self, trainer: Trainer, wait: bool = False) -> None:
        """Take the metrics that have arrived, and send for the next."""
        found = trainer.callback_metrics
        names = [name for name in _SHOWN if name in found]
        if self._coming is None and names:
            self._coming = names, LateCopy(torch.stack([found[name] for name in names]))
        if self._coming is not None and (wait or self._coming[1].arrived):
            sent, copy = self._coming
            self._here = dict(zip(sent, copy.read().tolist(), strict=True))
            self._coming = None
