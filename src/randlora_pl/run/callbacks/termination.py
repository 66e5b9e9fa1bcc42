"""Ends of a training run before its last step: SIGTERM of a batch system, a lost lock, a loss that is not finite."""

import math
import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import SoftFileLease
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from randlora_pl.run.callbacks.checkpoint import is_finite, save_adapter_of
from randlora_pl.tasks.module import own_module
from randlora_pl.utils.device import LateCopy, on_cuda
from randlora_pl.utils.errors import LostProcessError, UserError
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.run_files import ADAPTER, LAST, run_folder


class Termination(Callback):
    """Delay SIGTERM until the end of an optimizer step, when a checkpoint can be written.

    Lightning ends a training after the current micro-batch, but the gradients of an unfinished step cannot be saved.
    Runs with several processes are not changed: the signal reaches each process at a different time.
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
        """Pass on a signal received during the step; `AdapterCheckpoint` then saves and Lightning ends."""
        if trainer.global_step == self._step:
            return
        self._step, self._within = trainer.global_step, False
        if self._kept is not None:
            self._kept()


class HeldLock(Callback):
    """End a training that lost its lock, because another process may train in its folder.

    A process loses the lock when it is suspended or loses the disk for longer than its lease.
    """

    def __init__(self, lease: SoftFileLease, folder: Path) -> None:
        self._lease, self._folder = lease, folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Check the lock before `AdapterCheckpoint` runs, so that nothing more is written.

        Raises:
            LostProcessError: The lock is lost.
        """
        if lost := self._lease.compromise:
            resume = f"resume with: randlora-pl fit --resume {shlex.quote(str(self._folder))}{import_words()}"
            raise LostProcessError(
                f"the lock of its folder ({lost.reason}): check whether another process trains there, or {resume}"
            )


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
        """Read all results before a checkpoint, from which a resumed run would go on after the skipped step."""
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
