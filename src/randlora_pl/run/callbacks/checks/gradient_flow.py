"""Gradient-flow check: report trainable tensors that get no gradient."""

import logging
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from randlora_pl.utils.errors import UserError

_log = logging.getLogger("randlora_pl")
STEPS = 2
"""Of two factors whose product starts at zero, the second factor gets a gradient from the second step on."""


class GradientFlow(Callback):
    """Report every trainable tensor without a non-zero gradient in the first two optimizer steps.

    Tensors whose learning rate is 0 in these steps train later, and are left out.

    Args:
        action: ``warn`` logs a warning, ``raise`` stops the run, ``off`` disables the check.
    """

    def __init__(self, action: Literal["warn", "raise", "off"] = "warn") -> None:
        if action not in ("warn", "raise", "off"):
            raise UserError(f"gradient_flow.action is {action!r}. Set warn, raise or off.")
        self.action = action
        self.silent: list[str] = []
        self._seen: set[str] = set()
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip a resumed run, which was checked before."""
        self._steps = STEPS if self.action == "off" or trainer.global_step else 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Record tensors that have a gradient, and report at the second step."""
        if self._steps >= STEPS:
            return
        later = {id(value) for group in optimizer.param_groups if group["lr"] == 0 for value in group["params"]}
        own = pl_module.named_parameters()
        trained = {name: value for name, value in own if value.requires_grad and id(value) not in later}
        moved = {name: value.grad.any() for name, value in trained.items() if value.grad is not None}
        flags = torch.stack(list(moved.values())).tolist() if moved else []  # the host waits for a GPU once
        self._seen |= {name for name, flag in zip(moved, flags, strict=True) if flag}
        self._steps += 1
        if self._steps < STEPS:
            return
        self.silent = [name for name in trained if name not in self._seen]
        if not self.silent:
            return
        names = ", ".join(self.silent[:5]) + (" ..." if len(self.silent) > 5 else "")
        text = f"{len(self.silent)} of {len(trained)} trainable tensors had no gradient in {STEPS} steps: {names}"
        if self.action == "raise":
            raise UserError(f"{text}. They are trainable but are never updated. Check --model.targets.")
        _log.warning("%s", text)
