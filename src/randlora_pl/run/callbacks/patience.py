"""Early stopping when the monitored metric no longer improves."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from randlora_pl.run.callbacks.validation import validations
from randlora_pl.utils.errors import UserError


class Patience(EarlyStopping):
    """Stop after ``patience`` validations without improvement; a resumed run stops at the same step.

    It precedes `AdapterCheckpoint` in the list of callbacks, so that a checkpoint includes its last validation.

    Args:
        monitor: Validation metric.
        mode: ``max`` or ``min``: direction of the metric.
        patience: Validations without improvement.
    """

    def __init__(self, monitor: str, mode: str, patience: int) -> None:
        # `AdapterCheckpoint` reports a wrong monitor; a non-finite metric is not an improvement.
        super().__init__(
            monitor, patience=patience, mode=mode, strict=False, check_finite=False, check_on_train_epoch_end=False
        )

    @property
    def exhausted(self) -> bool:
        """True if the patience is used up."""
        return self.wait_count >= self.patience

    @property
    def reason(self) -> str:
        """Reason for the early stop."""
        return f"{self.monitor} did not improve in {self.wait_count} validation{'s' if self.wait_count > 1 else ''}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count of the resumed run, with the patience set last."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run without validations."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data.plan is None:
            data.setup("fit")  # on every rank: setup synchronizes them
        if validations(trainer, pl_module, data) == 0:
            raise UserError(
                f"checkpoint.patience is {self.patience}, but this run has no validation. Hold out {data.unit} for "
                "validation, set --trainer.limit_val_batches and --trainer.val_check_interval to use them, or remove "
                "--checkpoint.patience."
            )

    on_test_start = on_fit_start  # a zero-shot test comes first

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a resumed run that was killed after its final validation."""
        if self.exhausted:
            trainer.should_stop = True
