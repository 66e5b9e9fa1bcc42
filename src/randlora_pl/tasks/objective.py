"""The base of all tasks: what is learned, with options, model, losses, evaluation and files, but no trainer."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from randlora_pl.adapters import (
    Adapter,
    AdapterFile,
    InjectionReport,
    RandLoRA,
    inject,
    merge,
    save_adapter,
    set_train_mode,
    unmerge,
)
from randlora_pl.adapters.derived import derived_buffers
from randlora_pl.adapters.described import Described
from randlora_pl.adapters.methods.refine import Start, refine
from randlora_pl.adapters.operations import rates_of, undecayed
from randlora_pl.adapters.random_bases import drawn_on
from randlora_pl.adapters.save_load import check_loads_again
from randlora_pl.adapters.trained import stored_tensors
from randlora_pl.models import ModelIdentity, set_gradient_checkpointing
from randlora_pl.tasks.files import Adopted, check_options, check_tensors, checksum, kind_of
from randlora_pl.tasks.measures import ACCURACY, LOSS, Answers, Measure, class_answers, find_measure, number_answers
from randlora_pl.tasks.optim import (
    IMAGES,
    TOWERS,
    Factor,
    check_epochs,
    default_learning_rate,
    epoch_factors,
    parameter_groups,
    schedule_factor,
)
from randlora_pl.tasks.run import Run, build_backbone, cast_and_compile
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Declared, Fraction, NotNegative, Positive, option_types
from randlora_pl.utils.own_classes import check_importable, is_own, path_of

if TYPE_CHECKING:
    from randlora_pl.adapters.adapter_set import AdapterSet, Choice
    from randlora_pl.data.base import PlannedData
    from randlora_pl.tasks.losses import StepFeatures


class Objective(Declared, nn.Module):
    """The base of every task: what is learned by a frozen backbone with an adapter, which `AdaptationModule` trains.

    A subclass loads the backbone (`build`), and has the loss of each sample (`sample_losses`), an evaluation
    (`evaluate`) and, if it needs one, a head (`head_tensors`).

    Attributes:
        measures: Its metrics. The first that is validated counts: it selects the best adapter, and sweeps compare it.
        tuned_by: Name of the metric that a search of options compares, if it is not the one that counts.
        has_classes: True if it predicts classes; if not, its outputs are numbers or texts.
        answer: Name of a number or text that it predicts, as a column.
        zero_shot: True if the pretrained model is tested before the training.
        takes_captions: True if the data may be captions rather than classes.
        compares_names: True if it can compare images with the names of any classes (`ClipTask.percent_among`).
        vision_only: True if the image tower alone trains.
        blended_labels: True if the label of a training sample may be fractions of several classes.
        takes_several: True if a sample may have several classes, each with a probability of its own.
        several: True if the samples may have several classes.
        trained_head, tied_head: True if a head trains alongside the backbone, for this adapter; by default at its rate.
        data_module: Dotted path of the class of its data.
        place: Place of its default rate in `Adapter.learning_rates`, unless the image tower alone trains.
        runs_blocks: True if it calls the blocks of the backbone itself, so that hooks on its methods see nothing.
        typed_templates: True if the templates were typed, so that they count for other data, too.
        from_lora: True if its method may start from a LoRA that was trained by itself.
        adopts: Part of a model of which it takes over adapters of other programs.
        peft_type: The ``task_type`` in PEFT's files.
        to_train: What to do if nothing trains.
        adapters: All adapters of a backbone that tasks share.
        choice: Name of this task's own adapter among them, or a weighted sum.
        saved: The adapter file to load; its layers are adapted, whatever `targets` selects now.
        start: The LoRA whose outputs the training starts with; None for the base model's.
        identity: The base model, once it is built.
        report: The adapted layers, once the base model is built.
        run: The run that it is part of.
        step_features: Text features that the micro-batches of an optimizer step share, if it has some.
        metrics: Running metrics by name, such as ``val/acc``.
        retrieval: True if the data are captions, which are evaluated by recall.
    """

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY, LOSS)
    tuned_by = ""
    has_classes = True
    answer = "score"
    zero_shot = takes_captions = compares_names = vision_only = blended_labels = trained_head = tied_head = False
    runs_blocks = typed_templates = retrieval = takes_several = several = False
    from_lora = True
    adopts: ClassVar[Adopted | None] = None
    peft_type: ClassVar[str | None] = None
    to_train = "A linear probe needs --model LinearHeadTask."
    data_module = "randlora_pl.data.ImageData"
    place = TOWERS
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
    quantize: Literal["int8", "int4"] | None = None
    """Frozen linear layers in ``int8`` or, if the device supports it, ``int4`` (extra ``torchao``). Never merged."""
    torch_compile: bool | str = False
    """Compile each block at its first use (minutes): ``true``, a mode such as ``max-autotune``, or a backend. Not with
    ``memory: low`` or ``--trainer.strategy fsdp2``, which compiled blocks would undo."""
    seed: int = 0
    """Selects bases, initial values and dropout, and the weights of a new head or a random model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        nn.Module.__init__(self)
        if not self.adapter.trains_base and self.adapter.seed is None:
            self.adapter = self.adapter.replace(seed=self.seed)
        self.learning_rate = self.learning_rate or default_learning_rate(
            self.adapter, IMAGES if self.vision_only else self.place
        )
        if self.quantize is not None:
            from randlora_pl.tasks.quantize import check_quantize

            check_quantize(self.quantize, self.adapter)
        self.adapters: AdapterSet | None = None
        self.choice: Choice = None
        self.saved: AdapterFile | None = None
        self.start: Start | None = None
        self.identity: ModelIdentity
        self.report: InjectionReport
        self.run: Run[PlannedData] = Run()
        self.step_features: StepFeatures | None = None
        self.backbone: nn.Module | None = None
        self.classnames, self.templates = list[str](), list[str]()
        self.metrics = nn.ModuleDict()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which has no run."""
        return {**self.__dict__, "run": Run()}

    # The model

    def take_data(self, stage: str) -> None:
        """Take what a stage of the run needs from its data module, before the model is built: classes, for example."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Load the backbone, without an adapter, and set `identity`; called once, when classes are known."""

    def checkpoint_gradients(self, backbone: nn.Module) -> None:
        """Make the backbone recompute activations instead of keeping them."""
        set_gradient_checkpointing(backbone, True)

    def adapt(self) -> None:
        """Build the backbone and inject the adapter; the module calls it before every run, it acts once."""
        if self.backbone is not None:
            return
        source, device = self.start or self.saved, self.run.device
        backbone, notes = build_backbone(self.build, self.quantize, device, self.chosen_dtype())
        with drawn_on(device if device.type == "cuda" else None):
            if isinstance(source, Start):
                self.report = refine(backbone, source.file, self.adapter, source.form, self.targets)
            else:  # the layers of a file
                self.report = inject(backbone, self.adapter, self.targets if source is None else source.targets)
        self.report.notes += notes
        self.adapter = self.report.adapter  # with a matched rank filled in
        if self.gradient_checkpointing:
            self.checkpoint_gradients(backbone)
        low = bool(self.torch_compile) and any(getattr(leaf, "memory", None) == "low" for leaf in self.adapter.leaves())
        cast_and_compile(backbone, self.adapter.method(), self.chosen_dtype(), self.torch_compile, low, self.run)
        self.backbone = backbone
        self.start_head()
        set_train_mode(backbone, self.training)  # Lightning keeps the modes it finds
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(f"{self.adapter.method()} trains nothing in {type(self).__name__}. {self.to_train}")

    def chosen_dtype(self) -> str:
        """Return the dtype of frozen matrices: ``auto`` depends on precision and method."""
        if self.frozen_dtype != "auto":
            return self.frozen_dtype
        return "bfloat16" if self.run.precision == "bf16-mixed" and self.adapter.keeps_base else "float32"

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what trains; frozen layers stay in eval mode."""
        super().train(mode)
        if self.backbone is not None:
            set_train_mode(self.model, mode)
        return self

    @property
    def model(self) -> nn.Module:
        """The backbone with its adapter, built by `adapt`; a shared one is switched to its adapter."""
        if self.backbone is None:
            raise UserError("the backbone is not built yet; call adapt() first.")
        if self.adapters is not None:
            self.adapters.use(self.choice)
        return self.backbone

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    # Training

    def start_training(self) -> None:
        """Prepare for the first step of a new or resumed run, whose model is on its device."""

    def before_step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Change the gradients before an optimizer step, whose groups these are."""

    @abstractmethod
    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the loss (b,) of each sample of a training batch, and how far each is right (b,), if that applies."""

    def loss_weights(self, batch: dict[str, Any]) -> Tensor:
        """Return the weight (b,) of each sample's loss; the weighted sum over an optimizer step is its mean loss."""
        return batch["weight"]  # type: ignore[no-any-return]

    def loss_floor(self, batch: dict[str, Any]) -> Tensor | float:
        """Return the smallest possible loss (b,) of each sample, which the metric ``train/loss`` leaves out."""
        return 0.0

    def accumulated_loss(self, batch: dict[str, Any]) -> Tensor | None:
        """Return a term to add to the samples' losses, such as the gradient that earlier micro-batches left."""
        return None

    def class_logits(self, inputs: Any) -> Tensor:
        """Return logits (b, classes) for evaluation and prediction."""
        raise NotImplementedError

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the class probabilities of outputs (b, ...), or the outputs of an objective without classes."""
        outputs = outputs.float()
        return outputs if not self.has_classes else outputs.sigmoid() if self.several else outputs.softmax(1)

    def answers(self, predictions: Tensor, most: int = 5) -> Answers:
        """Return `predictions` (b, ...) for a person: the best classes, at most so many, or a number."""
        if not self.has_classes:
            return number_answers(predictions, self.answer)
        return class_answers(predictions, self.classnames, most, self.several)

    @classmethod
    def measure(cls, name: str = "", several: bool = False) -> Measure:
        """Return one of `measures` by its name (see `find_measure`), or without a name the one that counts."""
        return find_measure(cls.measures, name, several)

    def check_classes(self, classnames: Sequence[str], scores: bool = False) -> None:
        """Refuse fewer than two classes, and others than the task was built for; with ``scores`` there may be none."""
        if self.backbone is not None and list(classnames) != self.classnames:
            both = (self.classnames, classnames)
            there, here = (f"{len(names)} classes {list(names[:3])}" if names else "scores" for names in both)
            raise UserError(f"the task was built for {there}, the data has {here}. Create a new task.")
        if len(classnames) < (0 if scores and not classnames else 2):
            raise UserError(f"there is only the class {list(classnames)}; a classifier needs two or more.")

    @property
    def label_names(self) -> list[str]:
        """Name of each label of the data; none for captions, for several labels, and without classes."""
        return self.classnames if self.has_classes and not self.retrieval and not self.several else []

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups of what trains, with their learning rates."""
        model, options = self.model, (self.learning_rate or 0.0, self.weight_decay, self.decay_vectors)
        return parameter_groups(model.parameters(), *options, rates_of(model), undecayed(model))

    def rate_factors(self, groups: Sequence[dict[str, Any]]) -> list[Factor]:
        """Return the factor of each group's learning rate, by the schedule (see `check_schedule`)."""
        if self.schedule == "epochs":
            data = self.run.data
            self.check_schedule(data)
            assert data is not None and data.epochs
            return epoch_factors(data.finished_epochs, data.epochs, [group["lr"] for group in groups])
        how = (self.run.total_steps(), self.warmup_steps, self.final_lr_fraction, self.schedule)
        return [lambda step: schedule_factor(step, *how)] * len(groups)

    def check_schedule(self, data: "PlannedData | None") -> None:
        """Refuse a schedule that does not fit the length of the run, before anything is computed.

        Raises:
            UserError: The schedule is per epoch, and the run is planned in steps or has one epoch.
        """
        if self.schedule == "epochs":
            check_epochs(getattr(data, "epochs", None))

    # Evaluation, on merged weights

    def prepare_evaluation(self) -> None:
        """Merge the adapter if possible; subclasses prepare what all batches share."""
        merge(self.model, strict=False)

    @abstractmethod
    def evaluate(self, batch: dict[str, Any], stage: str) -> Any:
        """Update the metrics of a stage, ``val`` or ``test``, by a batch; return what callbacks get to see."""

    def meter(self, name: str) -> Metric:
        """Return one of the running metrics."""
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        return metric

    def stage_metrics(self, stage: str) -> dict[str, Metric]:
        """Return the running metrics of a stage by their names after ``STAGE/``; the module logs them."""
        names = [name for name in self.metrics if name.startswith(f"{stage}/")]
        return {name.removeprefix(f"{stage}/"): self.meter(name) for name in names}

    def final_metrics(self, stage: str) -> Mapping[str, Tensor | float]:
        """Return the metrics that need all samples of a stage by name, the one to watch first."""
        return {}

    def finish_evaluation(self) -> None:
        """Restore the frozen weights."""
        unmerge(self.model)

    def predict(self, batch: dict[str, Any]) -> Tensor:
        """Return the predictions (b, ...) of a batch."""
        raise NotImplementedError

    # Head, files and facts

    def head_tensors(self) -> dict[str, Tensor]:
        """Return the tensors outside the backbone that a prediction needs."""
        return {}

    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `head_tensors` back from an adapter folder; refuse tensors that do not fit."""
        own = self.head_tensors()
        check_tensors(tensors, own, own.keys(), "the head")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])

    def start_head(self) -> None:
        """Load the trained head of the LoRA that a run starts from, if the task has one.

        Raises:
            UserError: The file has no head of this kind, or one for other classes.
        """
        if self.start is None or not self.trained_head:
            return
        file = self.start.file
        theirs, kind, own = file.metadata.get("classnames"), file.metadata.get("task"), kind_of(type(self))
        if kind != own:
            raise UserError(f"{file.path} belongs to {kind}, and has no head for {own}. Set --model {kind}.")
        if theirs != self.classnames:
            raise UserError(
                f"the head of {file.path} is for {len(theirs or [])} classes, not for the "
                f"{len(self.classnames)} of this data. Give the LoRA's data with --data.dataset and --data.root."
            )
        self.load_head(file.extra)

    def constructor(self) -> dict[str, Any]:
        """Return the options as JSON values, without the adapter and the options of execution."""
        left_out = ("adapter", "frozen_dtype", "torch_compile", "liger")
        return {name: getattr(self, name) for name in option_types(type(self)) if name not in left_out}

    def check_loads_again(self) -> None:
        """Refuse a task whose file could not be loaded again.

        Raises:
            UserError: A class cannot be imported, or a file cannot hold an option.
        """
        check_loads_again(self.adapter)
        if is_own(type(self)):
            check_importable(type(self))
            check_options(self.constructor(), type(self).__name__)

    def save(self, folder: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
        """Write the adapter folder: trained tensors, head, class names and prompts.

        A task from outside is stored as its nearest parent here, with the path of its own class.

        Args:
            folder: Folder to write; an older one is replaced at once.
            summary: Metrics of the training, kept in the metadata.
        """
        self.check_loads_again()
        arguments = self.constructor()
        if self.identity.sha256:  # without the local path of the weights
            arguments["pretrained"] = self.identity.pretrained
        if self.identity.config_sha256:  # without the local path of the folder
            arguments["name"] = self.identity.name
        metadata = {
            "task": kind_of(type(self)),
            **({"task_class": path_of(type(self))} if is_own(type(self)) else {}),
            "arguments": arguments,
            "classnames": self.classnames,
            "templates": self.templates,
            "typed_templates": self.typed_templates,
            "captions": self.retrieval,
            **self.metadata(),
            "training": dict(summary or {}),
        }
        base, head = self.identity.as_dict(), self.head_tensors()
        packed = self.quantize is not None  # plain weights would give other derived tensors
        return save_adapter(self.model, folder, base_model=base, extra=head, metadata=metadata, keep_derived=packed)

    def fingerprint(self) -> str:
        """Return a checksum of the base model, the bases and the state: equal in all processes of a run."""
        state = self.trained_state() | self.own(derived_buffers(self.model))
        return checksum(state, f"{self.report.base_hash} {self.report.fingerprint}")

    def trained_state(self) -> dict[str, Tensor]:
        """Return what trains, and the kept buffers that belong to it, by their names in the state dict."""
        return stored_tensors(self, self.model)

    def trained_parameters(self) -> dict[str, Tensor]:
        """Return what trains, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def own(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return buffers of the model by their names in the task's state dict."""
        wanted = {id(buffer) for buffer in buffers.values()}
        return {name: buffer for name, buffer in self.named_buffers() if id(buffer) in wanted}

    @classmethod
    def arguments(cls, saved: Mapping[str, Any], source: object) -> dict[str, Any]:
        """Return the constructor's arguments from the JSON values of a file, with the objects among them.

        Raises:
            UserError: One of them is unknown, or its options do not fit.
        """
        return dict(saved)

    @property
    def trained_classes(self) -> list[str]:
        """Classes of the training; a task may be given others later."""
        return self.classnames

    def on_meta(self) -> tuple[nn.Module, list[str] | None] | None:
        """Return the backbone without values, and the layers to adapt; None if its shape is not known here."""
        return None

    def beside_on_meta(self, backbone: nn.Module) -> tuple[int, bool]:
        """Return how many numbers train besides adapter and head, for a backbone of `on_meta`, and if it has a head."""
        return 0, self.trained_head

    def parameter_parts(self) -> dict[str, int]:
        """Return the numbers that train, by part: adapter, prompts, head."""
        adapter = self.report.trainable
        head = sum(p.numel() for p in self.parameters() if p.requires_grad) - adapter
        return {"adapter": adapter, **({"head": head} if head else {})}

    def parts(self) -> list[Described]:
        """Return the parts other than the adapter that have options of their own."""
        return []

    def prompt_summary(self) -> str:
        """Return the prompts as one line, for the start page; "" without any."""
        return ""

    def rates(self) -> Mapping[str, float | None]:
        """Return the learning rates of what trains alongside the adapter, by name."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return options and numbers of the parts other than the adapter under flat keys, for ``results.json``."""
        return {}

    @property
    def loss_note(self) -> str:
        """Meaning of the metric ``train/loss`` if it is not plain, for the start page."""
        return ""

    def metadata(self) -> dict[str, Any]:
        """Return further entries of the metadata of an adapter file."""
        return {}

    def resolved(self) -> dict[str, Any]:
        """Return the constructor arguments with derived values, for the resolved config."""
        return {name: getattr(self, name) for name in ("pretrained", "learning_rate", "adapter", "targets")}
