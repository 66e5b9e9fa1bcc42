"""Progress and cost of a training run, which is a single Lightning epoch: bar or lines, steps, memory, speed."""

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from torch.optim import Optimizer

from randlora_pl.tasks.module import total_steps
from randlora_pl.utils.device import LateCopy
from randlora_pl.utils.text import duration, print_above_progress

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
        return self._here | {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}

    def _read(self, trainer: Trainer, wait: bool = False) -> None:
        """Take the metrics that have arrived, and send for the next."""
        metrics = trainer.callback_metrics
        names = [name for name in _SHOWN if name in metrics]
        if self._coming is None and names:
            self._coming = names, LateCopy(torch.stack([metrics[name] for name in names]))
        if self._coming is not None and (wait or self._coming[1].arrived):
            sent, copy = self._coming
            self._here = dict(zip(sent, copy.read().tolist(), strict=True))
            self._coming = None


class ProgressLines(Callback):
    """Print a line every `LINE_SECONDS` where a bar cannot move: in a log file of nohup, Slurm or a container.

    The line has the optimizer step, the steps per second since the line before, the time left, and the loss. Only rank
    0 prints.
    """

    _printed = 0.0  # time of the last line

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
        self._from = self._printed, trainer.global_step  # the rate counts from here

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Print the line of the training if it is due."""
        step, steps = trainer.global_step, total_steps(trainer)
        if step >= steps or not self._due(trainer):
            return
        (begun, first), rate = self._from, ""
        if step > first:
            each = (self._printed - begun) / (step - first)
            rate = f", {f'{1 / each:.3g} steps/s' if each < 1 else f'{each:.3g} s/step'}"
            rate += f", {duration(each * (steps - step))} left"
            self._from = self._printed, step
        metrics = trainer.callback_metrics
        shown = [f", {name} {float(metrics[name]):.4g}" for name in _SHOWN if name in metrics]
        print_above_progress(f"step {step:,} of {steps:,}{rate}{''.join(shown)}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock unless a training runs."""
        self._printed = self._printed or time.monotonic()

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print the line of a validation or a test if it is due."""
        done, batches = batch_idx + 1, sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
        if done < batches and self._due(trainer):
            print_above_progress(f"{'test' if trainer.testing else 'validation'}: {done:,} of {batches:,} batches")

    on_test_batch_end = on_validation_batch_end


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


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far in bytes.

    Args:
        device: Device of the model. CUDA: peak of PyTorch's allocator since the last reset. Others: peak resident set
            of the process since it started, or since Linux reset the counter, as before each cell of a sweep.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not available on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


class PeakMemory(Callback):
    """Log ``memory/peak_mb`` (10^6 bytes) during training; `peak` is the peak of the whole run."""

    _before = _here = 0

    @property
    def peak(self) -> int:
        """Peak in bytes of this process and the processes it resumes."""
        return max(self._before, self._here)

    def state_dict(self) -> dict[str, Any]:
        """Return the peak so far."""
        return {"peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the peak of the resumed run."""
        self._before = state_dict["peak"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the peak on a GPU."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Log the peak so far at the steps that are logged; on a GPU reading it takes 0.1 ms."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self._here or (every and trainer.global_step % every == 0):
            self._here = peak_bytes(pl_module.device)
        pl_module.log("memory/peak_mb", torch.tensor(self._here / 1e6), batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the peak a last time."""
        self._here = peak_bytes(pl_module.device)


class Throughput(Callback):
    """Log ``speed/images_per_second`` (``samples`` for texts); `seconds` is the time of the whole training.

    The rate is samples per wall-clock time, including waits for data; the first batches of a process and validation
    are excluded.
    """

    images = _batches = 0
    _counted = 0.0  # seconds of the counted batches
    _before = 0.0  # seconds of training in earlier processes of the run
    _started: float | None = None
    _last: float | None = None

    @property
    def per_second(self) -> float | None:
        """Samples per second on this device; None before any batch is counted."""
        return self.images / self._counted if self._counted else None

    @property
    def seconds(self) -> float:
        """Seconds of training, including validation, of this process and the processes it resumes."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far."""
        return {"images": self.images, "counted": self._counted, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts of the resumed run."""
        self.images, self._counted, self._before = (state_dict[key] for key in ("images", "counted", "seconds"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count one batch and the time since the previous one."""
        now = time.perf_counter()
        self._batches += 1
        if self._last is not None and self._batches > 3:  # the first ones include allocation and compilation
            self.images += len(batch["weight"])
            self._counted += now - self._last
        self._last = now
        if self.per_second is not None:
            unit = getattr(getattr(trainer, "datamodule", None), "unit", "images")
            pl_module.log(f"speed/{unit}_per_second", torch.tensor(self.per_second), batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude the time of a validation."""
        self._last = time.perf_counter() if self._last is not None else None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._before, self._started = self.seconds, None
