"""Progress of the training, which is a single Lightning epoch: a bar, or lines in a log file."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from torch.optim import Optimizer

from randlora_pl.utils.device import LateCopy
from randlora_pl.utils.text.console import print_above_progress
from randlora_pl.utils.text.formatting import duration

_SHOWN = ("train/loss", "train/acc")
LINE_SECONDS = 30.0
"""Seconds between two lines of `ProgressLines`."""


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


class ProgressLines(Callback):
    """Print a line every `LINE_SECONDS` where a bar cannot move: in a log file of nohup, Slurm or a container.

    The line has the optimizer step, the steps per second since the line before, the time left, and the loss. Only rank
    0 prints.
    """

    def __init__(self) -> None:
        self._printed, self._from = 0.0, (0.0, 0)  # time of the last line; time and step that the rate counts from

    def _due(self, trainer: Trainer) -> bool:
        """Return True if the next line is due, which it is at most once."""
        now = time.monotonic()
        if not trainer.is_global_zero or now - self._printed < LINE_SECONDS:
            return False
        console = Console()
        self._printed = now
        return not (console.is_interactive or console.is_jupyter)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._printed = time.monotonic()
        self._from = self._printed, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Print the line of the training if it is due."""
        step, steps = trainer.global_step, pl_module.total_steps()
        if step >= steps or not self._due(trainer):
            return
        (begun, first), rate = self._from, ""
        if step > first:
            each = (self._printed - begun) / (step - first)
            rate = f", {f'{1 / each:.3g} steps/s' if each < 1 else f'{each:.3g} s/step'}"
            rate += f", {duration(each * (steps - step))} left"
            self._from = self._printed, step
        found = trainer.callback_metrics
        shown = [f", {name} {float(found[name]):.4g}" for name in _SHOWN if name in found]
        print_above_progress(f"step {step:,} of {steps:,}{rate}{''.join(shown)}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock unless a training runs."""
        self._printed = self._printed or time.monotonic()

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Print the line of a validation if it is due."""
        self._evaluated(trainer, "validation", batch_idx + 1, trainer.num_val_batches)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Print the line of a test if it is due."""
        self._evaluated(trainer, "test", batch_idx + 1, trainer.num_test_batches)

    def _evaluated(self, trainer: Trainer, what: str, done: int, batches: list[int | float]) -> None:
        if done < sum(batches) and self._due(trainer):
            print_above_progress(f"{what}: {done:,} of {sum(batches):,} batches")


class StepNumbers(Callback):
    """Log learning rates, the passes over the data, and the optimizer step that loggers use for all of them."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the learning rates of the coming step."""
        name = f"lr-{type(optimizer).__name__}"
        for number, group in enumerate(optimizer.param_groups, 1):
            pl_module.log(
                f"{name}/pg{number}" if len(optimizer.param_groups) > 1 else name, torch.tensor(float(group["lr"]))
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log the step of training metrics, as a tensor of the host: Lightning would copy a number to the device."""
        pl_module.log("step", torch.tensor(float(trainer.global_step)))
        pl_module.log("epoch", torch.tensor(_passes(trainer)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the step of validation metrics during training."""
        if trainer.state.fn == "fit":
            pl_module.log("step", float(trainer.global_step), sync_dist=True)
            pl_module.log("epoch", _passes(trainer), sync_dist=True)


def _passes(trainer: Trainer) -> float:
    """Return the passes over the training samples so far: Lightning's own epoch is always 0."""
    plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
    if plan is None:  # in a script with other data
        return float(trainer.current_epoch)
    return float(min(trainer.global_step * plan.global_batch, plan.samples_drawn) / plan.num_samples)
