"""Course of a training run, which is one Lightning epoch: progress, memory, speed, and early ends."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import SoftFileLease
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from randlora_pl.run.callbacks.checkpoint import is_finite, save_adapter_of
from randlora_pl.tasks.module import own_module, total_steps
from randlora_pl.utils.device import LateCopy, on_cuda
from randlora_pl.utils.errors import LostProcessError, UserError
from randlora_pl.utils.run_files import ADAPTER, LAST, resume_command, run_folder
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
        """Return the metrics shown next to the bar."""
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
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any, **__: Any
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
        """Update the peak one last time."""
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


class Termination(Callback):
    """Delay SIGTERM until the end of an optimizer step, when a checkpoint can be written.

    Lightning ends a training after the current micro-batch, but the gradients of an unfinished step cannot be saved.
    Several processes end by their strategy (`AdapterDDP`): the signal reaches each process at a different time.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap Lightning's handler; Lightning removes both at the end of the run."""
        self._step, self._within = trainer.global_step, False  # True within an optimizer step
        self._kept: Callable[[], None] | None = None
        theirs: Any = signal.getsignal(signal.SIGTERM)
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread() or not callable(theirs):
            return

        def handler(number: int, frame: Any) -> None:
            if self._within:
                self._kept = lambda: theirs(number, None)
            else:
                theirs(number, frame)

        signal.signal(signal.SIGTERM, handler)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to delay the signal until the step is finished."""
        self._within = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Pass on a signal received during the step; `RunCheckpoint` then saves and Lightning ends."""
        if trainer.global_step == self._step:
            return
        self._step, self._within = trainer.global_step, False
        if self._kept is not None:
            self._kept()


class HeldLock(Callback):
    """End a run that lost its lock, because another process may train in its folder.

    A process loses the lock when it is suspended or loses the disk for longer than its lease.
    """

    def __init__(self, lease: SoftFileLease, folder: Path) -> None:
        self._lease, self._folder = lease, folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Check the lock before `RunCheckpoint` runs, so that nothing more is written.

        Raises:
            LostProcessError: The lock is lost.
        """
        if lost := self._lease.compromise:
            what = f"the lock of its folder ({lost.reason}): check whether another process trains there, or resume with"
            raise LostProcessError(f"{what}: {resume_command(self._folder)}")


class NonFiniteLoss(Callback):
    """Callback that stops at the first non-finite loss and keeps the last good adapter.

    On a CPU the loss is checked before the backward pass. There, a GPU would be idle until the host has seen the loss.
    On a GPU the check is on the device: the optimizer's kernel does not change the weights from the first non-finite
    loss on, and the host reads the result one optimizer step later. With several processes the gradients that they
    exchange anyway carry it.
    """

    _on_device = False  # True if the device checks
    _loss: Tensor | None = None  # the last loss, or the first that is not finite
    _found: Tensor | None = None  # 1.0 after an optimizer step with such a loss in any process
    _sent: tuple[int, LateCopy] | None = None  # both, after an optimizer step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose where to check: only fused optimizers and scaled gradients can skip a step without the host."""
        self._loss = self._found = self._sent = None
        self._step = trainer.global_step
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        skips = _scaler(trainer) is not None or all(group.get("fused") for group in groups)
        self._on_device = skips and any(on_cuda(p) for p in pl_module.parameters() if p.requires_grad)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss before the backward pass; the error has the last good adapter and options to lower."""
        if self._on_device:
            now = loss.detach().float()
            self._loss = now if self._loss is None else torch.where(self._loss.isfinite(), now, self._loss)
            if loss.requires_grad and (trainer.world_size > 1 or _scaler(trainer) is not None):
                finite = self._loss.isfinite()  # an infinite loss may have a finite gradient
                loss.register_hook(lambda gradient: torch.where(finite, gradient, math.nan))  # type: ignore[no-untyped-call]
            return
        spoilt = here = not bool(torch.isfinite(loss))
        if trainer.world_size > 1:  # otherwise the other processes would wait forever
            spoilt = trainer.strategy.reduce_boolean_decision(spoilt, all=False)
        if spoilt:
            what = str(float(loss.detach())) if here else _ELSEWHERE
            self._stop(trainer, pl_module, f"the loss is {what} at step {trainer.global_step + 1}", trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Make the optimizer skip this step on the device if a loss was not finite."""
        if not self._on_device or self._loss is None:
            return
        finite = self._loss.isfinite()
        if _scaler(trainer) is not None:  # it skips the step by the gradients, which may also overflow by its factor
            self._found = 1 - finite.float()
            if trainer.world_size > 1:
                torch.distributed.all_reduce(self._found, torch.distributed.ReduceOp.MAX)
            return
        if trainer.world_size > 1:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            finite = finite & torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()
        self._found = 1 - finite.float()
        optimizer.found_inf = self._found  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Read the result of the optimizer step before the last one, and send for the last one's."""
        if self._found is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._read(trainer, pl_module)
        self._send(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read all results before a checkpoint, from which a resumed run would continue after the skipped step."""
        self._read(trainer, pl_module)
        self._send(trainer)
        self._read(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last step, and the weights after it, which no loss follows."""
        self._read(trainer, pl_module)
        for optimizer in trainer.optimizers:
            vars(optimizer).pop("found_inf", None)
        if not is_finite(pl_module):
            step = trainer.global_step
            self._stop(trainer, pl_module, f"the weights are not finite after the last step {step}", step)

    def _send(self, trainer: Trainer) -> None:
        if self._loss is not None and self._found is not None:
            self._sent = trainer.global_step, LateCopy(torch.stack((self._loss, self._found)))

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the result that was sent is a non-finite loss."""
        if self._sent is None:
            return
        (step, copy), self._sent = self._sent, None
        loss, bad = copy.read().tolist()
        if bad:
            what = _ELSEWHERE if math.isfinite(loss) else str(loss)
            self._stop(trainer, pl_module, f"the loss is {what} at step {step}", step - 1)

    def _stop(self, trainer: Trainer, pl_module: LightningModule, what: str, step: int) -> NoReturn:
        """Save the weights after ``step``, or of the last checkpoint if those are not finite, and raise an error."""
        if not trainer.is_global_zero:  # rank 0 reports it
            raise SystemExit(2)
        last = run_folder(trainer) / LAST
        if not is_finite(pl_module) and last.is_file():
            checkpoint = torch.load(last, map_location="cpu", weights_only=True)
            pl_module.load_state_dict(checkpoint["state_dict"])
            step = checkpoint["global_step"]
        where = "No earlier weights are finite; nothing is kept."
        if is_finite(pl_module):
            save_adapter_of(trainer, pl_module, ADAPTER, {"step": step, "stopped": "the loss was not finite"})
            where = f"The weights before it are in {run_folder(trainer) / ADAPTER} (step {step})."
        rate = own_module(pl_module).objective.learning_rate or 0.0  # the peak rate, as set by the option
        advice = f"Lower --model.learning_rate (now {rate:.2g}, try {rate / 3:.1g}) or --model.adapter.alpha"
        raise UserError(
            f"{what}. {advice}"
            f"{'; --trainer.precision bf16-mixed overflows less' if trainer.precision == '16-mixed' else ''}. {where}"
        )


_ELSEWHERE = "not finite on one of the devices"


def _scaler(trainer: Trainer) -> Any:
    """Return the gradient scaler of 16-mixed, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)
