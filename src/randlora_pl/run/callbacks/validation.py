"""Default validation schedule: once per pass over the data, at least 5 and at most 20 times."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from randlora_pl.utils.errors import UserError

POINTS = 5
"""Minimum number of validations of a run."""
MOST = 20
"""Maximum number of validations of a run."""
FEW = 50
"""Fewer validation samples cannot choose a checkpoint: an accuracy near 50 % has a standard error of 7 points."""
TRIAL = 10
"""Shorter runs, in optimizer steps, are validated at their end only."""
_SAMPLES_PER_HELD_OUT = 8
"""Training samples between two validations per validation sample; validation then costs about 4 % of the training."""


def steps_between(steps: int, samples: int, held_out: int, global_batch: int) -> int:
    """Return the optimizer steps between two validations.

    The interval is one pass over the training samples, longer if the validation set is relatively large, at least a
    twentieth and at most a fifth of the run.

    Args:
        steps: Optimizer steps of the run.
        samples: Training samples.
        held_out: Validation samples.
        global_batch: Samples per optimizer step.
    """
    if steps < TRIAL:
        return max(1, steps)
    apart = math.ceil(max(samples, _SAMPLES_PER_HELD_OUT * held_out) / global_batch)
    return min(max(apart, math.ceil(steps / MOST)), steps // POINTS)


def steps_of(task: Any, data: Any) -> tuple[int, int]:
    """Return the optimizer steps of a planned run, and between two validations; ``data`` is set up for ``fit``."""
    steps = task.total_steps()
    return steps, steps_between(steps, data.plan.num_samples, data.held_out, data.plan.global_batch)


class ValidationSchedule(Callback):
    """Validate every `steps_between` optimizer steps, and at the end of the run."""

    def __init__(self) -> None:
        self._every = 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the validations; a resumed run may start with one."""
        self._every = steps_of(pl_module, trainer.datamodule)[1] * trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Set the interval, so that a validation ends the run, too.

        Lightning validates if ``val_check_batch`` divides the number of batches so far.
        """
        progress = trainer.fit_loop.epoch_loop.batch_progress
        ends = progress.is_last_batch or trainer.global_step >= pl_module.total_steps()
        trainer.val_check_batch = max(1, progress.current.ready) if ends else self._every


def validations(trainer: Trainer, task: Any, data: Any) -> int | None:
    """Return the number of validations of a planned run, or None if the interval is in time.

    Args:
        trainer: Trainer with its callbacks.
        task: Task attached to the trainer.
        data: Data module set up for ``fit``.
    """
    if not (data.held_out and trainer.limit_val_batches and trainer.check_val_every_n_epoch in (None, 1)):
        return 0
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return None
    steps, every = steps_of(task, data)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, ValidationSchedule) for callback in callbacks):
        return math.ceil(steps / every)
    batches, interval = steps * trainer.accumulate_grad_batches, trainer.val_check_interval
    if isinstance(interval, float):  # a fraction of all batches
        interval = max(1, int(data.plan.steps * trainer.accumulate_grad_batches * interval))
    return batches // interval if interval else 0


def validated_samples(trainer: Trainer, data: Any) -> int:
    """Return the samples of each validation: all, or as many as `limit_val_batches` leaves.

    Args:
        trainer: Trainer with its devices.
        data: Data module set up for ``fit``.
    """
    held_out, step = int(data.held_out), int(data.eval_batch_size) * trainer.world_size
    limit = trainer.limit_val_batches
    batches = limit if isinstance(limit, int) else int(limit * math.ceil(held_out / step))
    return min(held_out, batches * step)


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
