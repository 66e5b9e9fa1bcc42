"""Progress bar of the training, which is a single Lightning epoch."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, labeled `Training` and without the logger's version."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=True)  # a second; the end of a stage waits for one refresh

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics shown beside the bar."""
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
