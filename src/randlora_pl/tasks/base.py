"""What every task shares: a frozen backbone with an adapter, AdamW with a cosine, and its files."""

import hashlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from randlora_pl import rng
from randlora_pl.adapters import (
    Adapter,
    InjectionReport,
    inject,
    save_adapter,
    set_train_mode,
    unmerge,
)
from randlora_pl.adapters.files import make_adapter
from randlora_pl.errors import UserError
from randlora_pl.models import ImageSpec, ModelIdentity, library_of, set_gradient_checkpointing
from randlora_pl.tasks.checkpoint import check_adapter, check_tensors
from randlora_pl.tasks.defaults import check_options, default_learning_rate
from randlora_pl.tasks.evaluation import EvaluatedModule
from randlora_pl.tasks.optim import adamw_with_cosine, parameter_groups, take_rates


class AdaptationTask(EvaluatedModule):
    """Base of the tasks. Subclasses say what the backbone is and how images become class logits.

    Attributes:
        image_spec: What the backbone expects of an image; the data module asks for it.
        identity: Which base model it is, after `configure_model`.
        report: What was adapted, after `configure_model`.
        retrieval: Whether the data are captions rather than classes, so that recall is what counts.
    """

    zero_shot = True
    takes_captions = False
    vision_only = True
    image_spec: ImageSpec
    identity: ModelIdentity
    report: InjectionReport

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
        seed: int,
    ) -> None:
        super().__init__()
        check_options(learning_rate, weight_decay, warmup_steps, final_lr_fraction, max_grad_norm)
        if pretrained is None and name != "tiny":  # fine-tuning noise must be asked for
            if library_of(name) == "open_clip" or "." not in name:
                raise UserError(
                    f"--model.pretrained is missing: {name} needs weights. Give a tag (`randlora-pl models` shows "
                    "some), 'timm' for a timm model, a file, or 'random'."
                )
            pretrained = "timm"  # the weights of the tag in the name
        if not adapter.trains_base and adapter.seed is None:
            adapter = adapter.replace(seed=seed)
        self.name, self.pretrained, self.adapter, self.targets = name, pretrained, adapter, targets
        self.learning_rate = learning_rate or default_learning_rate(adapter, self.vision_only)
        self.weight_decay, self.decay_vectors = weight_decay, decay_vectors
        self.warmup_steps, self.final_lr_fraction = warmup_steps, final_lr_fraction
        self.max_grad_norm, self.gradient_checkpointing, self.seed = max_grad_norm, gradient_checkpointing, seed
        self.strict_loading = False  # checkpoints hold what trains; load_state_dict checks that strictly
        self.retrieval = False
        self.classnames: list[str] = []
        self.templates: list[str] = []
        self.backbone: nn.Module | None = None

    # What a subclass gives

    def build(self) -> nn.Module:
        """Loads the backbone, without an adapter, and sets `identity`; called once, when classes are known."""
        raise NotImplementedError

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Loss (b,) of each sample of a training batch, and whether each is right (b,)."""
        raise NotImplementedError

    def carried_loss(self, batch: dict[str, Any]) -> Tensor | None:
        """A term beside the samples' losses, such as the gradient that earlier micro-batches left."""
        return None

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors beside the backbone that a prediction needs."""
        return {}

    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors of `head_tensors` back from an adapter folder.

        Raises:
            UserError: If they do not fit.
        """
        own = self.head_tensors()
        check_tensors(tensors, own, own.keys(), "the head")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])

    # Building

    def set_classes(self, classnames: list[str], templates: list[str], captions: bool = False) -> None:
        """Names the classes; Lightning's `setup` takes them from the data module.

        Args:
            classnames: Name of each class, or the captions.
            templates: Prompt templates with one ``{}`` each.
            captions: Whether the names are captions, so that recall is what counts.

        Raises:
            UserError: If there are fewer than two, or the task was built for others or cannot do with captions.
        """
        if captions and not self.takes_captions:
            raise UserError(f"{type(self).__name__} needs classes, and these are captions: use VisionLanguageTask.")
        self.retrieval = captions
        if self.backbone is not None and classnames != self.classnames:
            raise UserError(
                f"the task was built for {len(self.classnames)} classes {self.classnames[:3]}..., the data have "
                f"{len(classnames)} classes {classnames[:3]}...; make a new task."
            )
        if len(classnames) < 2:
            raise UserError(f"there is only the class {classnames}; a classifier needs two or more.")
        self.classnames, self.templates = list(classnames), list(templates)
        self.set_meters(len(classnames))

    def setup(self, stage: str) -> None:
        """Takes class names and prompts from the data module.

        Raises:
            UserError: If there are none, or the task was built for others.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None and not self.classnames:
            raise UserError("the task needs a data module, or set_classes(classnames, templates) first.")
        if datamodule is not None and (self.backbone is None or datamodule.classnames != self.classnames):
            captions = getattr(getattr(datamodule, "row", None), "captions", False)
            self.set_classes(datamodule.classnames, datamodule.templates, captions)

    def configure_model(self) -> None:
        """Builds the backbone and injects the adapter; Lightning calls it before every run, it acts once."""
        if self.backbone is not None:
            return
        backbone = self.build()
        self.report = inject(backbone, self.adapter, self.targets)
        self.adapter = self.report.adapter  # with a matched rank filled in
        if self.gradient_checkpointing:
            set_gradient_checkpointing(backbone, True)
        self.backbone = backbone
        set_train_mode(backbone, self.training)  # Lightning keeps the modes it finds
        self._ddp_params_and_buffers_to_ignore = self._untrained()
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(
                f"{self.adapter.method()} trains nothing in {type(self).__name__}; "
                "a linear probe needs --model LinearHeadTask."
            )

    def _untrained(self) -> list[str]:
        """Frozen weights, bases, tokens: every process has them from the same files and seeds, so DDP sends none."""
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        return frozen + [name for name, _ in self.named_buffers()]

    def fingerprint(self) -> str:
        """A checksum of the base model, the bases, and every bit of what trains: equal in all processes of a run."""
        digest = hashlib.sha256(f"{self.report.base_hash} {self.report.fingerprint}".encode())
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                value = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(f"{name} {tuple(parameter.shape)}".encode() + value.numpy().tobytes())
        return digest.hexdigest()

    @property
    def model(self) -> nn.Module:
        """The backbone with its adapter.

        Raises:
            UserError: If `configure_model` has not run.
        """
        if self.backbone is None:
            raise UserError("the backbone is not built yet; call configure_model() first.")
        return self.backbone

    def resolved(self) -> dict[str, Any]:
        """Constructor arguments whose value was derived, for the resolved config."""
        return {"learning_rate": self.learning_rate, "adapter": self.adapter}

    def train(self, mode: bool = True) -> "AdaptationTask":
        """Training mode for what trains; frozen layers stay in eval mode."""
        super().train(mode)
        if self.backbone is not None:
            set_train_mode(self.backbone, mode)
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
        weight = batch["weight"]
        loss: Tensor = (losses * weight).sum()
        carried = self.carried_loss(batch)
        loss = loss if carried is None else loss + carried
        share = (weight > 0).float()
        share = share / share.sum().clamp(min=1)
        self.log("train/loss", (losses.detach() * share).sum(), prog_bar=True)
        self.log("train/acc", (right.float() * share).sum(), prog_bar=True)
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the whole gradient once per optimizer step (the official code clips every micro-batch)."""
        limit = gradient_clip_val if gradient_clip_val is not None else self.max_grad_norm
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, limit, "value")
            return
        parameters = [p for p in self.parameters() if p.requires_grad]
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
        """AdamW over what trains, cosine per optimizer step."""
        optimizer, scheduler = adamw_with_cosine(
            self.optimizer_groups(), self.total_steps(), self.warmup_steps, self.final_lr_fraction
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Files

    def constructor(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values, without the adapter: enough to build the task again."""
        names = [name for name in inspect.signature(type(self)).parameters if name != "adapter"]
        return {name: getattr(self, name) for name in names}

    def save(self, folder: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
        """Writes the adapter folder: trained tensors, head, class names and prompts.

        Args:
            folder: Where to write; an older folder is replaced at once.
            summary: Figures of the training, kept in the metadata.
        """
        metadata = {
            "task": type(self).__name__,
            "arguments": self.constructor(),
            "classnames": self.classnames,
            "templates": self.templates,
            "captions": self.retrieval,
            "training": dict(summary or {}),
        }
        return save_adapter(
            self.model, folder, base_model=self.identity.as_dict(), extra=self.head_tensors(), metadata=metadata
        )

    def trained_names(self) -> set[str]:
        """State-dict names of what trains."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps only what trains, and says what it belongs to."""
        own = self.trained_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        checkpoint["adapter"] = self.adapter.describe()
        checkpoint["base_model"] = self._base_model()

    def _base_model(self) -> str:
        """Name and weights of the base model, in words."""
        identity = self.identity
        return f"{identity.library} {identity.name} {identity.pretrained} (weights {self.report.base_hash[:12]})"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another adapter or base model.

        Raises:
            UserError: With both values.
        """
        if theirs := checkpoint.get("adapter"):
            saved = make_adapter(theirs["method"], theirs["options"], "the checkpoint")  # knows later options, too
            check_adapter(saved.identity(), self.adapter.identity())
        there, here = checkpoint.get("base_model", self._base_model()), self._base_model()
        if there != here:
            raise UserError(f"the checkpoint was trained on {there}, this run has {here}; choose the same base model.")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what trains, or a whole state, and complains about any name that does not fit.

        Raises:
            UserError: If a tensor that trains is missing, or one is unknown or of another shape.
        """
        check_tensors(state_dict, self.state_dict(), self.trained_names(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=False, assign=assign)
