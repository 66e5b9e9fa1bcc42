"""The steps of curves: the optimizer steps done so far, as in results and checkpoints; Lightning's are one less."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class StepNumbers(Callback):
    """Logs learning rates, and the number of the optimizer step, which loggers take for that of all metrics with it."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs the rates of the step that follows."""
        name = f"lr-{type(optimizer).__name__}"
        for number, group in enumerate(optimizer.param_groups, 1):
            pl_module.log(f"{name}/pg{number}" if len(optimizer.param_groups) > 1 else name, float(group["lr"]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Numbers the metrics of a training step."""
        pl_module.log("step", float(trainer.global_step))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Numbers those of a validation within a training."""
        if trainer.state.fn == "fit":
            pl_module.log("step", float(trainer.global_step), sync_dist=True)
