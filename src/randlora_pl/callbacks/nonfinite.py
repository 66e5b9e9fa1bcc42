"""Stop the run at an infinite or NaN loss, before the weights are damaged."""

from typing import NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from randlora_pl.callbacks.checkpoint import ADAPTER, LAST, is_finite, save_adapter_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.run_files import run_folder


class NonFiniteLoss(Callback):
    """Callback that stops at the first non-finite loss and keeps the last good adapter."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss before the backward pass; the error has the last good adapter and options to lower."""
        spoilt = here = not bool(torch.isfinite(loss))
        if trainer.world_size > 1:  # otherwise the other processes would wait forever
            spoilt = trainer.strategy.reduce_boolean_decision(spoilt, all=False)
        if spoilt:
            what = str(float(loss.detach())) if here else "not finite on one of the devices"
            self._stop(trainer, pl_module, f"the loss is {what} at step {trainer.global_step + 1}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights after the last step, which no loss follows."""
        if not is_finite(pl_module):
            self._stop(trainer, pl_module, f"the weights are not finite after the last step {trainer.global_step}")

    def _stop(self, trainer: Trainer, pl_module: LightningModule, what: str) -> NoReturn:
        if not trainer.is_global_zero:  # rank 0 reports it
            raise SystemExit(2)
        kept = self._keep(trainer, pl_module)
        rate = float(getattr(pl_module, "learning_rate", 0.0))  # the peak rate, as set by the option
        where = f"The weights before it are in {kept}." if kept else "No earlier weights are finite; nothing is kept."
        advice = f"Lower --model.learning_rate (now {rate:.2g}, try {rate / 3:.1g}) or --model.adapter.alpha"
        raise UserError(
            f"{what}. {advice}"
            f"{'; --trainer.precision bf16-mixed overflows less' if trainer.precision == '16-mixed' else ''}. {where}"
        )

    @staticmethod
    def _keep(trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Save the current weights if they are finite, else the weights of the last checkpoint."""
        folder, last, step = run_folder(trainer) / ADAPTER, run_folder(trainer) / LAST, trainer.global_step
        if not is_finite(pl_module):
            if not last.is_file():
                return None
            checkpoint = torch.load(last, map_location="cpu", weights_only=True)
            pl_module.load_state_dict(checkpoint["state_dict"])
            step = checkpoint["global_step"]
        save_adapter_of(trainer, pl_module, folder, {"step": step, "stopped": "the loss was not finite"})
        return f"{folder} (step {step})"
