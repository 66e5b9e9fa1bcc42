"""The base of all tasks: their options and state, and the methods that an objective defines."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, AdapterFile, InjectionReport, RandLoRA
from randlora_pl.adapters.described import Described
from randlora_pl.adapters.methods.refine import Start
from randlora_pl.models import ModelIdentity, set_gradient_checkpointing
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Declared, Fraction, NotNegative, Positive

TOWERS, IMAGES, TEXTS = 0, 1, 2
"""Places in `Adapter.learning_rates`: both towers, an image tower, a language model."""


def default_learning_rate(adapter: Adapter, place: int) -> float:
    """Return the default learning rate of a method: the lowest of the methods inside it.

    Raises:
        UserError: A method from outside has none.
    """
    leaves = adapter.leaves()
    if alone := [leaf.method() for leaf in leaves if leaf.learning_rates is None]:
        raise UserError(f"{alone[0]} has no learning rate of its own. Set it: --model.learning_rate 1e-3, for example.")
    rates: list[float] = [leaf.learning_rates[place] for leaf in leaves]
    return min(rates)


if TYPE_CHECKING:
    from randlora_pl.adapters.adapter_set import AdapterSet, Choice
    from randlora_pl.tasks.losses import StepFeatures


@dataclass(frozen=True)
class Measure:
    """A metric of an objective, as files, messages and tables show it.

    Examples:
        >>> Measure("mae", "mean error", mode="min", decimals=3).text(0.25)
        '0.250'

    Attributes:
        name: Its name in ``results.json``, behind ``val/`` or ``test/``.
        word: Its name in sentences.
        mode: Direction of better values.
        decimals: Printed decimals; None for a fraction, which is printed in percent.
        validated: True if a validation logs it, so that it can select the best adapter.
    """

    name: str
    word: str = ""
    mode: Literal["max", "min"] = "max"
    decimals: int | None = None
    validated: bool = True

    @property
    def called(self) -> str:
        """Its word, or else its name."""
        return self.word or self.name

    def text(self, value: float) -> str:
        """Return a value as it is printed."""
        return f"{100 * value:.2f} %" if self.decimals is None else f"{value:.{self.decimals}f}"


ACCURACY = Measure("acc", "accuracy")
LOSS = Measure("loss", mode="min", decimals=4)


@dataclass(frozen=True)
class Answers:
    """Predictions as a person reads them.

    Attributes:
        columns: Names of the cells.
        rows: Cells of each sample.
        note: Meaning of the columns, for a summary.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


Adopted = Literal["linear head", "image tower", "both towers", "decoder"]
"""Part of a model that an adapter of another program has trained."""


class Objective(Declared, LightningModule):
    """Options and state of a task, and the methods that define what it learns.

    Attributes:
        measures: Its metrics, the one that counts first: it selects the best adapter, and sweeps compare it.
        tuned_by: Name of the metric that a search of options compares, if it is not the one that counts.
        has_classes: True if it predicts classes; if not, its outputs are numbers or texts.
        answer: Name of a number or text that it predicts, as a column.
        zero_shot: True if the pretrained model is tested before the training.
        takes_captions: True if the data may be captions rather than classes.
        vision_only: True if the image tower alone trains.
        blended_labels: True if the label of a training sample may be fractions of several classes.
        trained_head: True if a head trains beside the backbone, for the features of this adapter alone.
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
        saved: The adapter file to load; it names the layers, whatever `targets` selects now.
        start: The LoRA whose outputs the training starts with; None for the base model's.
        identity: The base model, once it is built.
        report: The adapted layers, once the base model is built.
        procedure_state: State of the method's procedure from a checkpoint, until the training starts.
        step_sums: Sums over the micro-batches of an optimizer step so far, for the logged loss and accuracy.
        retrieval: True if the data are captions, which are evaluated by recall.
        test_name: Prefix of the metrics of a test, ``test`` or, before training, ``zeroshot``.
    """

    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY, LOSS)
    tuned_by = ""
    has_classes = True
    answer = "score"
    zero_shot = takes_captions = vision_only = blended_labels = trained_head = runs_blocks = typed_templates = False
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
        self.learning_rate = self.learning_rate or default_learning_rate(
            self.adapter, IMAGES if self.vision_only else self.place
        )
        self.adapters: AdapterSet | None = None
        self.choice: Choice = None
        self.saved: AdapterFile | None = None
        self.start: Start | None = None
        self.identity: ModelIdentity
        self.report: InjectionReport
        self.procedure_state: dict[str, Any] | None = None
        self.step_sums: Tensor | None = None
        self._step_features: StepFeatures | None = None
        self.backbone: nn.Module | None = None
        self.strict_loading = False  # checkpoints hold what trains; load_state_dict checks that strictly
        self.retrieval, self.test_name = False, "test"
        self.classnames, self.templates = list[str](), list[str]()
        self.metrics = nn.ModuleDict()
        self._draws = True  # random numbers while training

    # Defined by an objective

    @abstractmethod
    def build(self) -> nn.Module:
        """Load the backbone, without an adapter, and set `identity`; called once, when classes are known."""

    def checkpoint_gradients(self, backbone: nn.Module) -> None:
        """Make the backbone recompute activations instead of keeping them."""
        set_gradient_checkpointing(backbone, True)

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
        """Return a term beside the samples' losses, such as the gradient that earlier micro-batches left."""
        return None

    def class_logits(self, inputs: Any) -> Tensor:
        """Return logits (b, classes) for evaluation and prediction."""
        raise NotImplementedError

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the class probabilities of outputs (b, ...), or the outputs of an objective without classes."""
        return outputs.float().softmax(1) if self.has_classes else outputs.float()

    def answers(self, predictions: Tensor, most: int = 5) -> Answers:
        """Return `predictions` (b, ...) for a person: the best classes, at most so many, or a number."""
        if not self.has_classes:
            numbers = [[f"{value:.6f}"] for value in predictions[:, 0].tolist()]
            return Answers([self.answer], numbers, f"a {self.answer} of each")
        best = predictions.topk(min(most, len(self.classnames)))
        count = best.values.shape[1]
        further = [name for number in range(2, count + 1) for name in (f"class_{number}", f"probability_{number}")]
        rows = []
        for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            pairs = [(self.classnames[label], f"{value:.6f}") for label, value in zip(labels, values, strict=True)]
            rows.append([text for pair in pairs for text in pair])
        return Answers(["class", "probability", *further], rows, f"the best {count} classes of each")

    @classmethod
    def measure(cls, name: str = "") -> Measure:
        """Return one of `measures` by its name, or without a name the one that counts.

        A callback may log others: they are fractions, except for losses.
        """
        other = replace(LOSS, name=name) if name.endswith("loss") else Measure(name)
        return next((each for each in cls.measures if name in ("", each.name)), other)

    def check_classes(self, classnames: Sequence[str], scores: bool = False) -> None:
        """Refuse fewer than two classes, and others than the task was built for; with ``scores`` there may be none."""
        if self.backbone is not None and list(classnames) != self.classnames:
            both = (self.classnames, classnames)
            there, here = (f"{len(names)} classes {list(names[:3])}" if names else "scores" for names in both)
            raise UserError(f"the task was built for {there}, the data has {here}. Create a new task.")
        if len(classnames) < (0 if scores and not classnames else 2):
            raise UserError(f"there is only the class {list(classnames)}; a classifier needs two or more.")

    def evaluate(self, batch: dict[str, Any], stage: str, name: str) -> dict[str, Tensor]:
        """Update the metrics of a stage, ``val`` or ``test``, whose names begin with ``name``."""
        raise NotImplementedError

    def head_tensors(self) -> dict[str, Tensor]:
        """Return the tensors beside the backbone that a prediction needs."""
        return {}

    @classmethod
    def arguments(cls, saved: Mapping[str, Any], source: object) -> dict[str, Any]:
        """Return the constructor's arguments from the JSON values of a file, with the objects among them.

        Raises:
            UserError: One of them is unknown, or its options do not fit.
        """
        return dict(saved)

    def on_meta(self) -> tuple[nn.Module, list[str] | None] | None:
        """Return the backbone without values, and the layers to adapt; None if its shape is not known here."""
        return None

    def parameter_parts(self) -> dict[str, int]:
        """Return the numbers that train, by part: adapter, prompts, head."""
        adapter = self.report.trainable
        head = sum(p.numel() for p in self.parameters() if p.requires_grad) - adapter
        return {"adapter": adapter, **({"head": head} if head else {})}

    def parts(self) -> list[Described]:
        """Return the parts beside the adapter that have options of their own."""
        return []

    def prompt_summary(self) -> str:
        """Return the prompts as one line, for the start page; "" without any."""
        return ""

    def rates(self) -> Mapping[str, float | None]:
        """Return the learning rates of what trains beside the adapter, by name."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return options and numbers of the parts beside the adapter under flat keys, for ``results.json``."""
        return {}

    @property
    def loss_note(self) -> str:
        """Meaning of the metric ``train/loss`` if it is not plain, for the start page."""
        return ""

    def metadata(self) -> dict[str, Any]:
        """Return further entries of the metadata of an adapter file."""
        return {}

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

    @property
    def data(self) -> Any:
        """The data module of the run; None without one."""
        return None if self._trainer is None else getattr(self._trainer, "datamodule", None)
