"""The base of all tasks: a frozen backbone with an adapter, and AdamW with a schedule."""

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, AdapterFile, InjectionReport, RandLoRA, merge, set_train_mode, unmerge
from randlora_pl.adapters.methods.refine import Start
from randlora_pl.adapters.optimizer import rates_of, undecayed
from randlora_pl.models import ModelIdentity, set_gradient_checkpointing
from randlora_pl.tasks import files, optim, procedure
from randlora_pl.tasks.defaults import IMAGES, TOWERS, default_learning_rate
from randlora_pl.tasks.execution import cast_and_compile, draws_random_numbers, inject_by, prepare_products
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Declared, Fraction, NotNegative, Positive

if TYPE_CHECKING:
    from randlora_pl.adapters.adapter_set import AdapterSet, Choice


class AdaptationTask(Declared, LightningModule):
    """Base of the tasks. Subclasses load the backbone and compute the loss of each sample.

    Attributes:
        zero_shot: True if the pretrained model is tested before the training.
        takes_captions: True if the data may be captions rather than classes.
        vision_only: True if the image tower alone trains.
        blended_labels: True if the label of a training sample may be fractions of several classes.
        trained_head: True if a head trains beside the backbone, for the features of this adapter alone.
        data_module: Dotted path of the class of its data.
        runs_blocks: True if it calls the blocks of the backbone itself, so that hooks on its methods see nothing.
        typed_templates: True if the templates were typed, so that they count for other data, too.
        to_train: What to do if nothing trains.
        adapters: All adapters of a backbone that tasks share.
        choice: Name of this task's own adapter among them, or a weighted sum.
        saved: The adapter file to load; it names the layers, whatever `targets` selects now.
        start: The LoRA whose outputs the training starts with; None for the base model's.
        identity: The base model, once it is built.
        report: The adapted layers, once the base model is built.
        procedure_state: State of the method's procedure from a checkpoint, until the training starts.
        step_sums: Sums over the micro-batches of an optimizer step so far, for the logged loss and accuracy.
        retrieval: True if the data are captions, which are evaluated by recall.
        test_name: Prefix of the metrics of a test, ``test`` or, before training, ``zeroshot``.
    """

    zero_shot = takes_captions = vision_only = blended_labels = trained_head = runs_blocks = typed_templates = False
    to_train = "A linear probe needs --model LinearHeadTask."
    data_module = "randlora_pl.data.ImageData"
    optimizer, schedule = "adamw", "cosine"

    name: str = field(kw_only=False)
    """Name of the model."""
    pretrained: str | None = field(default=None, kw_only=False)
    """Weights of the model."""
    adapter: Adapter = RandLoRA()
    """The method and its options."""
    targets: list[str] | None = None
    """Layers to adapt, see the task."""
    learning_rate: Annotated[float, Positive] | None = None
    """Peak learning rate. Default: the paper's for the method; Table 8 and section C.3 for images, 1e-4 for texts (1e-2
    for VeRA, 1e-5 for full fine-tuning)."""
    weight_decay: Annotated[float, NotNegative] = 0.1
    """Decay of AdamW; 0 for what starts at values of the base model, as in PiSSA, DoRA and BitFit."""
    decay_vectors: bool = True
    """Decay biases, norms and scalars too, as in the protocol."""
    warmup_steps: Annotated[int, NotNegative] = 0
    """Optimizer steps of linear warm-up."""
    final_lr_fraction: Annotated[float, Fraction] = 0.01
    """Learning rate at the end of the schedule, as a fraction of the peak."""
    max_grad_norm: Annotated[float, Positive] | None = 1.0
    """Clip the gradient to this norm once per optimizer step; ``null`` for no clipping."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them."""
    frozen_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """``bfloat16`` keeps the frozen matrices in half the memory and saves their casts; what trains stays float32. Needs
    ``bf16-mixed``. ``auto`` is ``bfloat16`` there, unless the model's own tensors train."""
    torch_compile: bool | str = False
    """Compile each block at its first use (minutes): ``true``, a mode such as ``max-autotune``, or a backend. Not with
    ``memory: low`` or ``--trainer.strategy fsdp2``, which compiled blocks would undo."""
    seed: int = 0
    """Selects bases, initial values and dropout, and the weights of a new head or a random model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        LightningModule.__init__(self)
        if not self.adapter.trains_base and self.adapter.seed is None:
            self.adapter = self.adapter.replace(seed=self.seed)
        self.learning_rate = self.learning_rate or self.default_learning_rate(self.adapter)
        self.adapters: AdapterSet | None = None
        self.choice: Choice = None
        self.saved: AdapterFile | None = None
        self.start: Start | None = None
        self.identity: ModelIdentity
        self.report: InjectionReport
        self.procedure_state: dict[str, Any] | None = None
        self.step_sums: Tensor | None = None
        self.backbone: nn.Module | None = None
        self.strict_loading = False  # checkpoints hold what trains; load_state_dict checks that strictly
        self.retrieval, self.test_name = False, "test"
        self.classnames, self.templates = list[str](), list[str]()
        self.metrics = nn.ModuleDict()
        self._draws = True  # random numbers while training

    # Hooks for subclasses

    def default_learning_rate(self, adapter: Adapter) -> float:
        """Return the default learning rate of a method."""
        return default_learning_rate(adapter, IMAGES if self.vision_only else TOWERS)

    def build(self) -> nn.Module:
        """Load the backbone, without an adapter, and set `identity`; called once, when classes are known."""
        raise NotImplementedError

    def checkpoint_gradients(self, backbone: nn.Module) -> None:
        """Make the backbone recompute activations instead of keeping them."""
        set_gradient_checkpointing(backbone, True)

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the loss (b,) of each sample of a training batch, and how far each is right (b,), if that applies."""
        raise NotImplementedError

    def loss_weights(self, batch: dict[str, Any]) -> Tensor:
        """Return the weight (b,) of each sample's loss; the weighted sum over an optimizer step is its mean loss."""
        return batch["weight"]  # type: ignore[no-any-return]

    def loss_floor(self, batch: dict[str, Any]) -> Tensor | float:
        """Return the smallest possible loss (b,) of each sample, which the metric ``train/loss`` leaves out."""
        return 0.0

    def accumulated_loss(self, batch: dict[str, Any]) -> Tensor | None:
        """Return a term beside the samples' losses, such as the gradient that earlier micro-batches left."""
        return None

    def class_logits(self, inputs: Any) -> Tensor:
        """Return logits (b, classes) for evaluation and prediction."""
        raise NotImplementedError

    def evaluate(self, batch: dict[str, Any], stage: str, name: str) -> dict[str, Tensor]:
        """Update the metrics of a stage, ``val`` or ``test``, whose names begin with ``name``."""
        raise NotImplementedError

    def head_tensors(self) -> dict[str, Tensor]:
        """Return the tensors beside the backbone that a prediction needs."""
        return {}

    # Building

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
        files.start_head(self)
        set_train_mode(backbone, self.training)  # Lightning keeps the modes it finds
        # Every process has frozen weights, bases and tokens from the same files and seeds: DDP need not send them.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in self.named_buffers()]
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(f"{self.adapter.method()} trains nothing in {type(self).__name__}. {self.to_train}")

    @property
    def model(self) -> nn.Module:
        """The backbone with its adapter, built by `configure_model`; a shared one is switched to its adapter."""
        if self.backbone is None:
            raise UserError("the backbone is not built yet; call configure_model() first.")
        if self.adapters is not None:
            self.adapters.use(self.choice)
        return self.backbone

    def resolved(self) -> dict[str, Any]:
        """Return the constructor arguments with derived values, for the resolved config."""
        return {name: getattr(self, name) for name in ("pretrained", "learning_rate", "adapter", "targets")}

    def train(self, mode: bool = True) -> "AdaptationTask":
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
        self._draws = draws_random_numbers(self)
        unmerge(self.model)
        procedure.start(self)
        if self.torch_compile:
            prepare_products(self, str(self.trainer.precision))
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        optim.set_learning_rates(self.trainer.optimizers[0], scheduler, self.optimizer_groups())

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Make dropout a function of the seed and the position in the run, so that a resumed run repeats it."""
        if self._draws:
            position = torch.tensor(batch_idx * self.trainer.world_size + self.trainer.global_rank)
            torch.manual_seed(int(rng.words(self.seed, "dropout", position)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the weighted sum of the samples' losses; the weights make it the exact mean over the step."""
        (losses, right), weight = self.sample_losses(batch), self.loss_weights(batch)
        loss: Tensor = (losses * weight).sum()
        for term in (self.accumulated_loss(batch), procedure.penalty(self, batch)):
            loss = loss if term is None else loss + term
        optim.add_to_step(self, losses.detach() - self.loss_floor(batch), right, weight)
        return loss

    configure_gradient_clipping, optimizer_zero_grad = optim.configure_gradient_clipping, optim.optimizer_zero_grad
    configure_optimizers, optimizer_step = optim.configure_optimizers, procedure.optimizer_step

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups of what trains, with their learning rates."""
        model, options = self.model, (self.learning_rate or 0.0, self.weight_decay, self.decay_vectors)
        return optim.parameter_groups(model.parameters(), *options, rates_of(model), undecayed(model))

    def total_steps(self) -> int:
        """Return the optimizer steps of the run."""
        return optim.planned_steps(self.trainer)

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

    load_head, constructor, save = files.load_head, files.constructor, files.save
    fingerprint, trained_state, rate_factors = files.fingerprint, files.trained_state, optim.rate_factors
    on_save_checkpoint, on_load_checkpoint = files.on_save_checkpoint, files.on_load_checkpoint

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what trains, or a whole state, strictly; statistics that it lacks become the base model's."""
        files.check_state(self, state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)
