"""A loss that is infinite or not a number ends the run before the weights are spoilt."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from randlora_pl.callbacks.checkpoint import ADAPTER, LAST, is_finite, save_adapter_of
from randlora_pl.callbacks.run_folder import run_folder
from randlora_pl.errors import UserError


class NonFiniteLoss(Callback):
    """Stops at the first loss that is not finite and keeps the last good adapter."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks at the loss before it touches the weights.

        Raises:
            UserError: The loss is not finite: says where the last good adapter is and what to lower.
        """
        if bool(torch.isfinite(loss)):
            return
        kept = self._keep(trainer, pl_module) if trainer.is_global_zero else None
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rate = max(rates, default=0.0)
        where = f"The weights before it are in {kept}." if kept else "No earlier weights are finite; nothing is kept."
        advice = f"Lower --model.learning_rate (now {rate:.2g}, try {rate / 3:.1g}) or --model.adapter.alpha"
        raise UserError(
            f"the loss is {float(loss)} at step {trainer.global_step + 1}. {advice}"
            f"{'; --trainer.precision bf16-mixed overflows less' if trainer.precision == '16-mixed' else ''}. {where}"
        )

    @staticmethod
    def _keep(trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Saves the current weights if they are finite, else those of the last checkpoint."""
        folder, last, step = run_folder(trainer) / ADAPTER, run_folder(trainer) / LAST, trainer.global_step
        if not is_finite(pl_module):
            if not last.is_file():
                return None
            checkpoint = torch.load(last, map_location="cpu", weights_only=True)
            pl_module.load_state_dict(checkpoint["state_dict"])
            step = checkpoint["global_step"]
        save_adapter_of(trainer, pl_module, folder, {"step": step, "stopped": "the loss was not finite"})
        return f"{folder} (step {step})"
