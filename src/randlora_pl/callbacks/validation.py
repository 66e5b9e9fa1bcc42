"""When a training validates where nothing is typed: once a pass over its data, and at least five times."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

POINTS = 5
"""Validations of a run, at least."""
TRIAL = 10
"""A run of fewer optimizer steps is validated at its end alone: it only shows that everything works."""
_SHARE = 8
"""Training samples between two validations for each validated one: a validation then costs some 4 % of the training."""


def steps_between(steps: int, samples: int, held_out: int, window: int) -> int:
    """Return the optimizer steps between two validations.

    They are one pass over the training samples, more where the validation set is large beside it, and at most a fifth
    of the run.

    Args:
        steps: Optimizer steps of the run.
        samples: Training samples.
        held_out: Validation samples.
        window: Samples of an optimizer step.
    """
    if steps < TRIAL:
        return max(1, steps)
    return min(math.ceil(max(samples, _SHARE * held_out) / window), steps // POINTS)


def steps_of(task: Any, data: Any) -> tuple[int, int]:
    """Return the optimizer steps of a planned run, and those between two of its validations.

    Args:
        task: The task, attached to its trainer.
        data: The data module, set up for ``fit``.
    """
    steps = task.total_steps()
    return steps, steps_between(steps, data.plan.num_samples, data.held_out, data.plan.window)


class ValidationSchedule(Callback):
    """Has Lightning validate every so many optimizer steps (`steps_between`), and once more at the end of the run."""

    def __init__(self) -> None:
        self._every = 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the validations; a resumed run may have to begin with one."""
        self._every = steps_of(pl_module, trainer.datamodule)[1] * trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        self._set(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Has the end of the run validated, whatever the number of its batches."""
        self._set(trainer, pl_module)

    def _set(self, trainer: Trainer, task: Any) -> None:
        """Lightning validates where the number of batches so far is a multiple of ``val_check_batch``."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        ends = progress.is_last_batch or trainer.global_step >= task.total_steps()
        trainer.val_check_batch = max(1, progress.current.ready) if ends else self._every


def validations(trainer: Trainer, task: Any, data: Any) -> int | None:
    """Return how often a planned run is validated; None where the clock decides.

    Args:
        trainer: With its callbacks.
        task: The task, attached to it.
        data: The data module, set up for ``fit``.
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
    if isinstance(interval, float):  # a share of all batches
        interval = max(1, int(data.plan.steps * trainer.accumulate_grad_batches * interval))
    return batches // interval if interval else 0
