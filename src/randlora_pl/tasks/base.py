"""What every task shares: a frozen backbone with an adapter, and AdamW with a schedule."""

import math
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from randlora_pl.adapters import (
    Adapter,
    AdapterFile,
    AdapterSet,
    inject,
    set_train_mode,
    unmerge,
)
from randlora_pl.adapters.adapter_set import Choice
from randlora_pl.adapters.io.compatibility import targets_in
from randlora_pl.adapters.operations import report_of
from randlora_pl.models import cast_frozen, compile_blocks, set_gradient_checkpointing
from randlora_pl.tasks.defaults import (
    FROZEN_DTYPES,
    check_option,
    check_options,
    check_precision,
)
from randlora_pl.tasks.files import SavedModule
from randlora_pl.tasks.optim import adamw_with_schedule, parameter_groups, take_rates
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError


class AdaptationTask(SavedModule):
    """Base of the tasks. Subclasses say what the backbone is and what a sample's loss is.

    Attributes:
        zero_shot: Whether the untrained model is tested before the training.
        data_module: Dotted path of the class of its data.
        schedule: How the learning rate falls, ``cosine`` or ``linear``.
        adapters: The adapters that take turns in the backbone, where other tasks have it, too.
        choice: Which of them, or which weighted sum, is this task's own.
        saved: An adapter that is to be loaded: the layers are its own, whatever the targets name by now.
    """

    zero_shot = False
    schedule: str = "cosine"
    data_module = "randlora_pl.data.ImageData"
    adapters: AdapterSet | None = None
    choice: Choice = None
    saved: AdapterFile | None = None

    def __init__(
        self,
        *,
        name: str,
        pretrained: str | None,
        adapter: Adapter,
        targets: list[str] | None,
        learning_rate: float | None,
        weight_decay: float,
        decay_vectors: bool,
        warmup_steps: int,
        final_lr_fraction: float,
        max_grad_norm: float | None,
        gradient_checkpointing: bool,
        frozen_dtype: str,
        torch_compile: bool | str,
        seed: int,
    ) -> None:
        super().__init__()
        check_options(learning_rate, weight_decay, warmup_steps, final_lr_fraction, max_grad_norm)
        if not adapter.trains_base and adapter.seed is None:
            adapter = adapter.replace(seed=seed)
        self.name, self.adapter, self.targets = name, adapter, targets
        self.pretrained = self.which_weights(name, pretrained)
        self.learning_rate = learning_rate or self.usual_rate(adapter)
        self.weight_decay, self.decay_vectors = weight_decay, decay_vectors
        self.warmup_steps, self.final_lr_fraction = warmup_steps, final_lr_fraction
        self.max_grad_norm, self.gradient_checkpointing, self.seed = max_grad_norm, gradient_checkpointing, seed
        check_option("frozen_dtype", frozen_dtype, frozen_dtype in FROZEN_DTYPES, " or ".join(FROZEN_DTYPES))
        self.frozen_dtype, self.torch_compile = frozen_dtype, torch_compile
        self.backbone: nn.Module | None = None

    # What a subclass gives

    @staticmethod
    def which_weights(name: str, pretrained: str | None) -> str | None:
        """The base model's weights, where they may be left out.

        Raises:
            UserError: They may not.
        """
        return pretrained

    def usual_rate(self, adapter: Adapter) -> float:
        """The learning rate of a method, where none is given."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """Loads the backbone, without an adapter, and sets `identity`; called once, when classes are known."""
        raise NotImplementedError

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Loss (b,) of each sample of a training batch, and whether, or how far, each is right (b,).

        The second is None where none is right or wrong.
        """
        raise NotImplementedError

    def loss_weights(self, batch: dict[str, Any]) -> Tensor:
        """Weight (b,) of each sample's loss: they make the sum over a window's micro-batches and devices its mean."""
        weight: Tensor = batch["weight"]
        return weight

    def carried_loss(self, batch: dict[str, Any]) -> Tensor | None:
        """A term beside the samples' losses, such as the gradient that earlier micro-batches left."""
        return None

    # Building

    def configure_model(self) -> None:
        """Builds the backbone and injects the adapter; Lightning calls it before every run, it acts once."""
        if self.backbone is not None:
            return
        backbone = self.build()
        targets = self.targets if self.saved is None else targets_in(self.saved, backbone)
        self.report = inject(backbone, self.adapter, targets)
        self.adapter = self.report.adapter  # with a matched rank filled in
        if self.gradient_checkpointing:
            self.checkpoint_gradients(backbone)
        self._execute(backbone)
        self.backbone = backbone
        set_train_mode(backbone, self.training)  # Lightning keeps the modes it finds
        self._ddp_params_and_buffers_to_ignore = self._untrained()
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(
                f"{self.adapter.method()} trains nothing in {type(self).__name__}; "
                "a linear probe needs --model LinearHeadTask."
            )

    def checkpoint_gradients(self, backbone: nn.Module) -> None:
        """Has the backbone recompute activations instead of keeping them."""
        set_gradient_checkpointing(backbone, True)

    def join(self, adapters: AdapterSet, name: str) -> None:
        """Takes a backbone that other tasks have, too; for prediction and evaluation.

        Args:
            adapters: The adapters of all of them.
            name: This task's own, which becomes the active one whenever the task uses its `model`.
        """
        self.backbone, self.adapters, self.choice = adapters.model, adapters, name
        self.report = report_of(self.model)

    def _execute(self, backbone: nn.Module) -> None:
        """Casts frozen weights and compiles blocks, where that was asked for."""
        precision = str(self.trainer.precision) if self._trainer is not None else None
        check_precision(precision, self.frozen_dtype)
        if self.frozen_dtype != "float32" and not cast_frozen(backbone, getattr(torch, self.frozen_dtype)):
            raise UserError(
                f"--model.frozen_dtype {self.frozen_dtype}: {self.adapter.method()} leaves no matrix frozen to cast."
            )
        if self.torch_compile:
            if getattr(self.adapter, "memory", None) == "low":
                raise UserError(
                    "--model.torch_compile keeps what memory: low would build again: leave out one of them, or take "
                    "--model.gradient_checkpointing true instead of memory: low."
                )
            backend = "inductor" if self.torch_compile is True else self.torch_compile
            device = self.trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")
            compile_blocks(backbone, backend, device)

    def _untrained(self) -> list[str]:
        """Frozen weights, bases, tokens: every process has them from the same files and seeds, so DDP sends none."""
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        return frozen + [name for name, _ in self.named_buffers()]

    @property
    def model(self) -> nn.Module:
        """The backbone with its adapter; a backbone that tasks share is switched to that of this task.

        Raises:
            UserError: If `configure_model` has not run.
        """
        if self.backbone is None:
            raise UserError("the backbone is not built yet; call configure_model() first.")
        if self.adapters is not None:
            self.adapters.use(self.choice)
        return self.backbone

    def resolved(self) -> dict[str, Any]:
        """Constructor arguments whose value was derived, for the resolved config."""
        return {"learning_rate": self.learning_rate, "adapter": self.adapter, "targets": self.targets}

    def train(self, mode: bool = True) -> "AdaptationTask":
        """Training mode for what trains; frozen layers stay in eval mode."""
        super().train(mode)
        if self.backbone is not None:
            set_train_mode(self.model, mode)
        return self

    # Training

    def on_train_start(self) -> None:
        """Starts from unmerged weights, in training mode; what was typed beats the rates of a checkpoint."""
        self.train()
        unmerge(self.model)
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR)
        take_rates(optimizer, scheduler, self.optimizer_groups())

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Makes dropout a function of the seed and the position in the run, so that a resumed run repeats it."""
        position = torch.tensor(batch_idx * self.trainer.world_size + self.trainer.global_rank)
        torch.manual_seed(int(rng.words(self.seed, "dropout", position)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted sum of the samples' losses; the weights make it the exact mean over the whole window."""
        losses, right = self.sample_losses(batch)
        weight = self.loss_weights(batch)
        loss: Tensor = (losses * weight).sum()
        carried = self.carried_loss(batch)
        loss = loss if carried is None else loss + carried
        share = weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
        self.log("train/loss", (losses.detach() * share).sum(), prog_bar=True)
        if right is not None:
            self.log("train/acc", (right.float() * share).sum(), prog_bar=True)
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the whole gradient once per optimizer step (the official code clips every micro-batch)."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if gradient_clip_algorithm == "value":  # Lightning's own function takes no fused optimizer
            nn.utils.clip_grad_value_(parameters, math.inf if gradient_clip_val is None else gradient_clip_val)
            return
        limit = self.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        self.log("train/grad_norm", nn.utils.clip_grad_norm_(parameters, limit or math.inf))

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Groups of what trains, with their learning rates."""
        return parameter_groups(self.model.parameters(), self.learning_rate, self.weight_decay, self.decay_vectors)

    def total_steps(self) -> int:
        """Optimizer steps of the run, from the data module's plan where there is one.

        Lightning's own estimate makes the data loader, and so fixes where it starts, before a checkpoint
        has said how far the run is.
        """
        plan = getattr(getattr(self.trainer, "datamodule", None), "plan", None)
        if plan is None:
            return int(self.trainer.estimated_stepping_batches)
        return int(plan.steps if self.trainer.max_steps < 0 else min(plan.steps, self.trainer.max_steps))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over what trains, its schedule per optimizer step; fused unless 16-mixed scales the gradients."""
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None and self.device.type in ("cpu", "cuda")
        optimizer, scheduler = adamw_with_schedule(
            self.optimizer_groups(),
            self.total_steps(),
            self.warmup_steps,
            self.final_lr_fraction,
            fused,
            self.schedule,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
