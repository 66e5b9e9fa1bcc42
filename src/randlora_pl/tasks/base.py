"""The LightningModule of all tasks: a frozen backbone with an adapter, trained and evaluated by an objective."""

from typing import Any, Self

import torch
from torch import Tensor

from randlora_pl.adapters import merge, set_train_mode, unmerge
from randlora_pl.tasks.execution import cast_and_compile, draws_random_numbers, inject_by, prepare_products
from randlora_pl.tasks.files import Stored
from randlora_pl.tasks.optim import set_learning_rates
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError


class AdaptationTask(Stored):
    """The LightningModule of every task.

    A subclass defines an `Objective`: it loads the backbone (`build`), and has the loss of each sample
    (`sample_losses`), an evaluation (`evaluate`) and, if it needs one, a head (`head_tensors`).
    """

    def configure_model(self) -> None:
        """Build the backbone and inject the adapter; Lightning calls it before every run, it acts once."""
        if self.backbone is not None:
            return
        backbone = self.build()
        self.report = inject_by(self._trainer, backbone, self.adapter, self.targets, self.start or self.saved)
        self.adapter = self.report.adapter  # with a matched rank filled in
        if self.gradient_checkpointing:
            self.checkpoint_gradients(backbone)
        cast_and_compile(backbone, self.adapter, self.frozen_dtype, self.torch_compile, self._trainer)
        self.backbone = backbone
        self.start_head()
        set_train_mode(backbone, self.training)  # Lightning keeps the modes it finds
        # Every process has frozen weights, bases and tokens from the same files and seeds: DDP need not send them.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in self.named_buffers()]
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(f"{self.adapter.method()} trains nothing in {type(self).__name__}. {self.to_train}")

        self.check_built()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what trains; frozen layers stay in eval mode."""
        super().train(mode)
        if self.backbone is not None:
            set_train_mode(self.model, mode)
        return self

    # Training

    def on_fit_start(self) -> None:
        """Check the data before the first step."""
        self.check_data()

    def on_train_start(self) -> None:
        """Start from unmerged weights, in training mode; typed options take precedence over a checkpoint's rates."""
        self.train()
        self.step_sums = None  # of a run that ended within a step
        self._draws = draws_random_numbers(self)
        unmerge(self.model)
        self.start_procedure()
        if self.torch_compile:
            prepare_products(self, str(self.trainer.precision))
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        set_learning_rates(self.trainer.optimizers[0], scheduler, self.optimizer_groups())

        self.begin()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave alone what does not train."""
        self.drop_unused(optimizer)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Make dropout a function of the seed and the position in the run, so that a resumed run repeats it."""
        if self._draws:
            position = torch.tensor(batch_idx * self.trainer.world_size + self.trainer.global_rank)
            torch.manual_seed(int(rng.words(self.seed, "dropout", position)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the weighted sum of the samples' losses; the weights make it the exact mean over the step."""
        (losses, right), weight = self.sample_losses(batch), self.loss_weights(batch)
        loss: Tensor = (losses * weight).sum()
        for term in (self.accumulated_loss(batch), self.penalty(batch)):
            loss = loss if term is None else loss + term
        self.add_to_step(losses.detach() - self.loss_floor(batch), right, weight)
        return loss

    # Evaluation, on merged weights

    def prepare_evaluation(self) -> None:
        """Merge the adapter if possible; subclasses prepare what all batches share."""
        merge(self.model, strict=False)

    def log_metrics(self, stage: str, name: str) -> None:
        """Log metrics of the whole set, under names that begin with ``name``; `evaluate` logs others."""

    def finish_evaluation(self) -> None:
        """Restore the frozen weights."""
        unmerge(self.model)

    def on_validation_epoch_start(self) -> None:
        """Prepare the evaluation."""
        self.prepare_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation, and end the evaluation."""
        self.log_metrics("val", "val")
        self.finish_evaluation()

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test, and end the evaluation."""
        self.log_metrics("test", self.test_name)
        self.finish_evaluation()

    def on_predict_epoch_end(self) -> None:
        """End the evaluation."""
        self.finish_evaluation()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Evaluate a batch of the validation split."""
        return self.evaluate(batch, "val", "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Evaluate a batch of the test split."""
        return self.evaluate(batch, "test", self.test_name)
