"""Steps and epochs of curves: completed optimizer steps, as in results and checkpoints; Lightning's are one less."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


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
