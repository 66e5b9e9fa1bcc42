"""The gradient-flow alarm: a tensor that is declared trainable and gets no gradient is named."""

import logging
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from randlora_pl.utils.errors import UserError

_log = logging.getLogger("randlora_pl")
STEPS = 2
"""Of two factors whose product starts at zero, the second has a gradient from the second step on."""


class GradientFlow(Callback):
    """After the second optimizer step, names every trainable tensor that never had a non-zero gradient.

    Args:
        action: ``warn`` says so in the log and goes on, ``raise`` stops the run, ``off`` does not look.
    """

    def __init__(self, action: Literal["warn", "raise", "off"] = "warn") -> None:
        if action not in ("warn", "raise", "off"):
            raise UserError(f"gradient_flow.action is {action!r}: choose warn, raise or off.")
        self.action = action
        self.silent: list[str] = []
        self._seen: set[str] = set()
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run was looked at before."""
        self._steps = STEPS if self.action == "off" or trainer.global_step else 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Notes which tensors have a gradient, and judges at the second step."""
        if self._steps >= STEPS:
            return
        trained = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
        self._seen |= {name for name, value in trained.items() if value.grad is not None and bool(value.grad.any())}
        self._steps += 1
        if self._steps < STEPS:
            return
        self.silent = [name for name in trained if name not in self._seen]
        if not self.silent:
            return
        names = ", ".join(self.silent[:5]) + (" ..." if len(self.silent) > 5 else "")
        text = f"{len(self.silent)} of {len(trained)} trainable tensors had no gradient in {STEPS} steps: {names}"
        if self.action == "raise":
            raise UserError(f"{text}. They are declared trainable and never move; see --model.targets.")
        _log.warning("%s", text)
