"""Early stopping: a training ends where its monitored metric no longer improves."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from randlora_pl.callbacks.validation import validations
from randlora_pl.utils.errors import UserError


class Patience(EarlyStopping):
    """Ends a training after so many validations without a better metric; a resumed one ends at the same step.

    It stands before `AdapterCheckpoint` in the list of callbacks, so that a checkpoint knows of its last validation.

    Args:
        monitor: Metric of the validation.
        mode: ``max`` or ``min``: what a better metric is.
        patience: Validations without a better one.
    """

    def __init__(self, monitor: str, mode: str, patience: int) -> None:
        # `AdapterCheckpoint` says what is wrong with the monitor; a metric that is not finite is no better one.
        super().__init__(
            monitor, patience=patience, mode=mode, strict=False, check_finite=False, check_on_train_epoch_end=False
        )

    @property
    def exhausted(self) -> bool:
        """Whether the training ends."""
        return self.wait_count >= self.patience

    @property
    def reason(self) -> str:
        """Why it ends."""
        return f"{self.monitor} did not improve in {self.wait_count} validation{'s' if self.wait_count > 1 else ''}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the count of the resumed run; the patience is the one that was typed last."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run without validations already before its zero-shot test."""
        self._check(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run without validations.

        Raises:
            UserError: Nothing is validated.
        """
        self._check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a resumed run that was killed after the validation which had ended it."""
        if self.exhausted:
            trainer.should_stop = True

    def _check(self, trainer: Trainer, task: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data.plan is None:
            data.setup("fit")  # in every process: they meet there
        if validations(trainer, task, data) == 0:
            raise UserError(
                f"checkpoint.patience is {self.patience}, but nothing is validated in this run. Keep {data.unit} for "
                "validation and let --trainer.limit_val_batches and --trainer.val_check_interval use them, or leave "
                "out --checkpoint.patience."
            )
