"""The LightningModule of all tasks: a frozen backbone with an adapter, trained and evaluated by an objective."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from randlora_pl.adapters import inject, merge, set_train_mode, unmerge
from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.adapters.methods.refine import Start, refine
from randlora_pl.adapters.random_bases import drawn_on
from randlora_pl.models import cast_frozen, compile_blocks, use_fast_layers
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
        backbone, source = self.build(), self.start or self.saved
        device = torch.device("cpu") if self._trainer is None else self.trainer.strategy.root_device
        with drawn_on(device if device.type == "cuda" else None):
            if isinstance(source, Start):
                self.report = refine(backbone, source.file, self.adapter, source.form, self.targets)
            else:  # a file names the layers
                self.report = inject(backbone, self.adapter, self.targets if source is None else source.targets)
        self.adapter = self.report.adapter  # with a matched rank filled in
        if self.gradient_checkpointing:
            self.checkpoint_gradients(backbone)
        self._cast_and_compile(backbone, device)
        self.backbone = backbone
        self.start_head()
        set_train_mode(backbone, self.training)  # Lightning keeps the modes it finds
        # Every process has frozen weights, bases and tokens from the same files and seeds: DDP need not send them.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in self.named_buffers()]
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(f"{self.adapter.method()} trains nothing in {type(self).__name__}. {self.to_train}")

    def _cast_and_compile(self, backbone: nn.Module, device: torch.device) -> None:
        """Cast frozen weights and compile blocks; refuse options that exclude each other or round small steps away."""
        precision = None if self._trainer is None else str(self.trainer.precision)
        if precision in ("bf16-true", "16-true"):
            raise UserError(
                f"--trainer.precision {precision} would round the trainable parameters and small updates. Use "
                "bf16-mixed, and --model.frozen_dtype bfloat16 to keep the frozen weights in half the memory."
            )
        dtype = self.chosen_dtype()
        if dtype == "bfloat16" and precision not in (None, "bf16-mixed"):
            raise UserError(f"--model.frozen_dtype bfloat16 needs --trainer.precision bf16-mixed, not {precision}.")
        if dtype != "float32" and not cast_frozen(backbone, getattr(torch, dtype)):
            raise UserError(f"--model.frozen_dtype {dtype}: {self.adapter.method()} leaves no matrix frozen to cast.")
        use_fast_layers(backbone)
        if self.torch_compile:
            if any(getattr(leaf, "memory", None) == "low" for leaf in self.adapter.leaves()):
                raise UserError(
                    "--model.torch_compile keeps what memory: low would build again: leave out one of them, or take "
                    "--model.gradient_checkpointing true instead of memory: low."
                )
            compile_blocks(backbone, "default" if self.torch_compile is True else self.torch_compile, device)

    def chosen_dtype(self) -> str:
        """Return the dtype of frozen matrices: ``auto`` depends on precision and method."""
        if self.frozen_dtype != "auto":
            return self.frozen_dtype
        mixed = self._trainer is not None and str(self.trainer.precision) == "bf16-mixed"
        return "bfloat16" if mixed and self.adapter.keeps_base else "float32"

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what trains; frozen layers stay in eval mode."""
        super().train(mode)
        if self.backbone is not None:
            set_train_mode(self.model, mode)
        return self

    # Training

    def on_train_start(self) -> None:
        """Start from unmerged weights, in training mode; typed options take precedence over a checkpoint's rates."""
        self.train()
        self.step_sums = None  # of a run that ended within a step
        self._draws = any(draws_random_numbers(module) for module in self.modules() if module.training)
        unmerge(self.model)
        self.start_procedure()
        if self.torch_compile:  # compiled blocks read copies of the bases
            precisions = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
            for module in self.modules():
                if isinstance(module, RandLoRADelta):
                    module.prepare(precisions.get(str(self.trainer.precision), torch.float32))
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        set_learning_rates(self.trainer.optimizers[0], scheduler, self.optimizer_groups())

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Make dropout a function of the seed and the position in the run, so that a resumed run repeats it."""
        if self._draws:
            position = torch.tensor(batch_idx * self.trainer.world_size + self.trainer.global_rank)
            torch.manual_seed(int(rng.words(self.seed, "dropout", position)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the weighted sum of the samples' losses; the weights make it the exact mean over the step."""
        (losses, right), weight = self.sample_losses(batch), self.loss_weights(batch)
        loss: Tensor = (losses * weight).sum()
        if (carried := self.accumulated_loss(batch)) is not None:
            loss = loss + carried
        penalty, procedure = None, self.report.procedure
        if procedure is not None and batch["micro_batch"] >= batch["micro_batches"] - 1:  # the last of a step
            penalty = procedure.penalty()
        if penalty is not None:
            # Lightning divides by the accumulation, also in a shorter last step. DDP averages over the processes, which
            # all have the same term.
            loss = loss + penalty * self.trainer.accumulate_grad_batches
        values = [torch.ones_like(weight), losses.detach() - self.loss_floor(batch)]
        values += [] if right is None else [right.float()]
        sums = (torch.stack(values) * weight).sum(1)  # for `log_step`
        self.step_sums = sums if self.step_sums is None else self.step_sums + sums
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


_FIXED = (nn.Linear, nn.LayerNorm, nn.ModuleDict, nn.ModuleList, nn.Sequential, nn.ParameterDict, nn.ParameterList)
"""Modules that draw no random numbers."""


def draws_random_numbers(module: nn.Module) -> bool:
    """Return True if a module in training mode has dropout, or might draw random numbers in another way."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    own = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
    if isinstance(module, DeltaWeight) and own:
        return module.drops
    return not (own or type(module) in _FIXED or isinstance(module, Metric | MetricCollection))
