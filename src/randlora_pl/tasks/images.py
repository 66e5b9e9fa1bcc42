"""Bases of the tasks on images: classes and their prompts, accuracy and predictions, and CLIP's two towers."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from randlora_pl.adapters import disabled, merge, merge_and_unload
from randlora_pl.data import ImageData
from randlora_pl.data.unlabelled import frame_of
from randlora_pl.models import ImageTower, clip_image_spec, library_of, load_clip, meta_clip
from randlora_pl.models.catalog import OWN, TINY_TAG, is_folder
from randlora_pl.models.text import Tokenizer, image_features, zero_shot_accuracy
from randlora_pl.tasks.losses import StepFeatures, class_losses, set_losses
from randlora_pl.tasks.measures import set_metrics
from randlora_pl.tasks.objective import Objective
from randlora_pl.tasks.run import Run
from randlora_pl.tasks.second_head import SecondHead
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.options import NotNegative, Probability


@dataclass(frozen=True)
class UsedPrompts:
    """Texts that name the classes of a run, each with ``{}`` for the name; a task's ``used_prompts`` returns them.

    Attributes:
        training: Of these a class has one in each step if `drawn`, else their mean.
        evaluation: Of these a class has the mean, also in predictions.
        drawn: True if the texts train.
        learned: What learned the texts or the classifier of an evaluation, which has no words then.
    """

    training: Sequence[str] = field(default_factory=list)
    evaluation: Sequence[str] = field(default_factory=list)
    drawn: bool = False
    learned: str = ""

    def summary(self) -> str:
        """Return the prompts as one line, "" if there are none."""
        if self.learned:
            words = f"{_listed(self.training)} in training; " if self.training else ""
            return f"{words}learned by {self.learned}"
        prompts = _listed(self.evaluation)
        if self.training != self.evaluation:
            return f"{_listed(self.training)} in training; in evaluation {prompts}"
        if self.drawn and len(self.training) > 1:
            return f"{prompts}; in training a class has one of them in each step"
        return prompts


def _listed(texts: Sequence[str]) -> str:
    shown = ", ".join(f'"{text}"' for text in texts[:3]) + ", ..." * (len(texts) > 3)
    return shown if len(texts) <= 1 else f"the mean of {len(texts)}: {shown}"


class ImageTask(Objective):
    """Base of the tasks on images.

    Attributes:
        names_others: True if it can predict classes that were not in its training.
        unit_features: True if the logits are linear in features of unit length.
        decoupled: A second head next to the linear one, if there is one.
    """

    unit_features = True
    names_others = False

    name: str = field(default="tiny", kw_only=False)
    """An open_clip architecture, for example ``ViT-B-32``, or ``tiny`` (bundled)."""
    pretrained: str | None = field(default=None, kw_only=False)
    """A tag of open_clip, a weights file, or ``random``. Only ``tiny`` needs none: it is bundled with its weights."""
    targets: list[str] | None = None
    """Layers to adapt: regular expressions over layer names or the aliases ``qkv q k v kv o fc1 fc2 attn mlp all
    conv``, with an optional tower (``visual:mlp``). Default: packed q/k/v and both MLP matrices of every tower that
    trains; convolutions and attention pool of a ResNet."""
    keep_features: Annotated[float, NotNegative] = 0.0
    """Weight of a term of the loss against forgetting: 1 minus the cosine of an image's features with and without the
    adapter. It costs one forward pass more for each image, and ``train/loss`` leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run: Run[ImageData]
        self.image_spec = self.model_spec()
        self.decoupled: SecondHead | None = None
        self._features: Tensor | None = None
        if self.keep_features and not (self.adapter.keeps_base and (self.adapter.updates or not self.vision_only)):
            why = "changes no features" if self.adapter.keeps_base else "leaves no pretrained model to compare with"
            raise UserError(f"--model.keep_features: {self.adapter.method()} {why}. Remove it, or choose RandLoRA.")
        if self.pretrained is None and is_folder(self.name):  # also a repository of the Hub
            self.pretrained = OWN
        elif self.pretrained is None and self.name == "tiny":
            self.pretrained = TINY_TAG
        elif self.pretrained is None:
            if library_of(self.name) == "open_clip" or "." not in self.name:
                raise UserError(
                    f"--model.pretrained is missing: {self.name} needs weights. Give a tag (`randlora-pl models` shows "
                    "some), 'timm' for a timm model, a file, or 'random'."
                )
            self.pretrained = "timm"  # the weights of the tag in the name

    def model_spec(self) -> ImageSpec:
        """Return the preprocessing of the model's images."""
        return clip_image_spec(self.name, self.pretrained)

    def on_meta(self) -> tuple[nn.Module, list[str] | None] | None:
        """Return the backbone without values, and the layers to adapt."""
        clip = meta_clip(self.name)
        return ImageTower(clip) if self.vision_only else clip, self.targets

    @abstractmethod
    def build_on(self, other: "ImageTask") -> None:
        """Make everything except the backbone, for the backbone that another task has built."""

    def use_sum(self, others: Mapping[str, "ImageTask"], name: str) -> None:
        """Prepare for weights that are a sum of this update and others'.

        Args:
            others: The other tasks by name.
            name: Name of this task.

        Raises:
            UserError: Another task has other parts than this one.
        """

    @property
    def shares_features(self) -> bool:
        """True if its logits follow from the features of the plain image tower by `head_weight` or `decoupled`."""
        return True

    @property
    def frame(self) -> ImageSpec:
        """Preprocessing of the images: of the adapter file, else of the data or the model."""
        if self.saved is None and (own := getattr(self.run.data, "frame", None)) is not None:
            return cast(ImageSpec, own)
        return frame_of({} if self.saved is None else self.saved.metadata, self.image_spec)

    # Plain modules for an export

    def check_part(self, part: str) -> None:
        """Refuse to export a part that is another model without the rest: ``classifier``, ``image`` or ``text``.

        Raises:
            UserError: It is; the message has what works.
        """

    def head_weight(self) -> Tensor:
        """Return the weight (classes, features) that maps features to logits."""
        raise NotImplementedError  # the logits of another task may not be linear in the features

    def feature_head(self) -> nn.Module:
        """Return the module from image features, as a copy without the rest, to the logits of `class_logits`."""
        weight = self.head_weight().detach()
        if self.decoupled is not None:
            return self.decoupled.classifier(weight)
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return head

    def unload(self) -> nn.Module:
        """Return the model with merged weights; with the adapter inside if its update depends on the input."""
        return merge_and_unload(self.model) if self.adapter.fixed else self.model

    def image_tower(self) -> nn.Module:
        """Return the module from normalized images to features; without the text tower."""
        return self.model

    def text_model(self) -> tuple[nn.Module, Tokenizer]:
        """Return a CLIP model that encodes texts, without an adapter, and its tokenizer.

        Raises:
            UserError: There is none.
        """
        raise UserError(f"{type(self).__name__} has no text tower. Use --part classifier or image.")

    def described_parts(self) -> dict[str, Any]:
        """Return the parts other than the adapter as JSON values, for the facts of an export."""
        return {}

    # Classes and prompts

    def used_prompts(self, templates: Sequence[str] | None = None) -> UsedPrompts:
        """Return the prompts of the task, with the templates of other data if given; here none."""
        return UsedPrompts()

    def prompt_summary(self) -> str:
        """Return the prompts as one line; captions have none."""
        return "" if self.retrieval else self.used_prompts().summary()

    def templates_for(self, others: Sequence[str] | None) -> Sequence[str]:
        """Return the templates of other data instead of the own ones, unless there are none or the own were typed."""
        return self.templates if others is None or self.typed_templates else others

    def use_typed_prompts(self) -> None:
        """Take typed prompts.

        Raises:
            UserError: The task has no use for them.
        """
        kind = type(self).__name__
        raise UserError(f"--data.templates: {kind} reads no texts. Remove it, or use --model TextHeadTask.")

    def metadata(self) -> dict[str, Any]:
        """Return the prompts, and what a label is, for an adapter file."""
        return {"prompts": asdict(self.used_prompts())} | ({"several_labels": True} if self.several else {})

    def set_classes(
        self, classnames: list[str], templates: list[str], captions: bool = False, several: bool = False
    ) -> None:
        """Name the classes; `take_data` takes them from the data module.

        Args:
            classnames: Name of each class, or the captions.
            templates: Prompt templates with one ``{}`` each.
            captions: True if the names are captions, so that recall is what counts.
            several: True if an image may have several of the classes.

        Raises:
            UserError: If there are fewer than two, or the task was built for others, or cannot do with captions or
                with several classes of an image.
        """
        if several and not self.takes_several:
            what = f"{type(self).__name__} learns one class for each image, and these images have several labels."
            raise UserError(what, "Use --model LinearHeadTask.")
        if self.backbone is not None and several != self.several:
            raise UserError("the task was built for one label of each image, or for several. Create a new task.")
        self.several = several
        if captions and not self.takes_captions:
            raise UserError(f"{type(self).__name__} needs classes, but these are captions. Use VisionLanguageTask.")
        self.retrieval = captions
        if self.has_classes:
            self.check_classes(classnames)
        most = 50_000  # the largest published sets have 22,000; each is encoded, and counted against each other one
        if len(classnames) > most and not captions:
            raise UserError(f"there are {len(classnames):,} classes; at most {most:,} are possible.")
        self.classnames, self.templates = list(classnames) if self.has_classes else [], list(templates)
        for stage in ("val", "test"):
            made = {**self.make_metrics(), "loss": MeanMetric()}
            self.metrics.update({f"{stage}/{name}": metric for name, metric in made.items()})

    def take_data(self, stage: str) -> None:
        """Take class names and prompts from the data module; for the classes of a loaded file, its prompts.

        Typed prompts come first, then those that were typed for the loaded file, whatever its classes.

        Raises:
            UserError: If there are none, the task was built for others, or it has no use for typed prompts.
        """
        datamodule = self.run.data
        if datamodule is None:
            if self.has_classes and not self.classnames:
                raise UserError("the task needs a data module, or set_classes(classnames, templates) first.")
            return
        typed, templates = getattr(datamodule, "typed_templates", False), datamodule.templates
        several = getattr(datamodule, "several", False)
        if self.backbone is None or datamodule.classnames != self.classnames or several != self.several:
            captions = getattr(getattr(datamodule, "row", None), "captions", False)
            saved = {} if self.saved is None else self.saved.metadata
            if typed:
                self.use_typed_prompts()
            elif (typed := saved.get("typed_templates", False)) or saved.get("classnames") == datamodule.classnames:
                templates = saved["templates"]
            self.typed_templates = typed
            self.set_classes(datamodule.classnames, templates, captions, several)
        elif typed and not (self.typed_templates and templates == self.templates):
            raise UserError("--data.templates: the task was built for other prompts. Create a new task for these.")

    # Training and evaluation

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the loss (b,) of each image's outputs."""
        return self.output_loss(self.class_logits(batch["image"]), batch["label"]), None

    def noted(self, features: Tensor) -> Tensor:
        """Return the features (b, e) of a batch's images as they are, and note them for `accumulated_loss`."""
        if self.keep_features and self.training and torch.is_grad_enabled():
            if not features.requires_grad:
                raise UserError("--model.keep_features: this training changes no image features. Remove it.")
            self._features = features
        return features

    def accumulated_loss(self, batch: dict[str, Any]) -> Tensor | None:
        """Return the term of ``keep_features`` for a micro-batch, None without one.

        Distances to features of the frozen tower: Mukhoti et al., arXiv 2308.13320, and PromptSRC.
        """
        features, self._features = self._features, None
        if features is None:
            return None
        tower = getattr(self.model, "visual", self.model)  # of CLIP, without learned prompts
        with torch.no_grad(), disabled(self.model):
            frozen = normalize(image_features(tower, batch["image"]))
        distances = 1 - (normalize(features) * frozen).sum(1)
        return self.keep_features * (distances * self.loss_weights(batch)).sum()

    def output_loss(self, outputs: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
        """Return the loss (b,) of outputs (b, ...) for labels (b,): by default the cross-entropy over all classes.

        Args:
            outputs: What `class_logits` returns.
            labels: Number of each image's class in the data; (b, classes) if it may have several (see `set_losses`).
            reduction: ``none``, or ``sum`` for the sum over the images.
        """
        if self.several:
            return set_losses(outputs, labels, reduction=reduction)
        return nn.functional.cross_entropy(outputs, labels, reduction=reduction)

    def make_metrics(self) -> dict[str, Metric]:
        """Return new metrics in addition to the loss, by their names in `measures`."""
        if self.several:
            return set_metrics(len(self.classnames))
        return {"acc": MulticlassAccuracy(len(self.classnames), average="micro", validate_args=False)}

    def compared(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and truth as the metrics compare them."""
        return (self.predictions(outputs), labels.long()) if self.several else (outputs, labels)

    def evaluate(self, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
        """Update loss and metrics by the samples that count (weight above zero)."""
        outputs = self.class_logits(batch["image"]).float()
        counts, labels = batch["weight"] > 0, batch["target" if self.several else "label"]
        losses = self.output_loss(outputs, labels)
        chosen = slice(None) if batch.get("whole") else counts  # else a GPU is waited for
        if batch.get("whole") or counts.any():
            compared = self.compared(outputs[chosen], labels[chosen])
            for key, metric in self.stage_metrics(stage).items():
                metric.update(*((losses[chosen],) if key == "loss" else compared))
        results = {"label": labels, "index": batch["index"], "weight": batch["weight"]}
        return results | ({"logits": outputs} if self.has_classes else {})

    def predict(self, batch: dict[str, Any]) -> Tensor:
        """Return class probabilities, (b, classes) float32; NaN for images that were skipped or only fill a batch.

        The batch is of the data module's test images, or of `randlora_pl.data.open_images`. A task without classes
        returns its outputs.
        """
        predictions = self.predictions(self.class_logits(batch["image"]))
        return predictions.masked_fill(batch["weight"][:, None] == 0, float("nan"))


class TowerTask(ImageTask):
    """Base of the tasks that train an image tower against a head of all classes."""

    vision_only = blended_labels = True

    label_smoothing: Annotated[float, Probability] = 0.0
    """Fraction of each training target that is spread evenly over all classes, with several labels over yes and no. 0.1
    is usual."""

    def head_weight(self) -> Tensor:
        """Return the weight (classes, features) of the head."""
        return self.head_tensors()["head"]

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the cross-entropy over all classes (see `class_losses`), or of each class (see `set_losses`)."""
        logits = self.class_logits(batch["image"])
        if self.several:
            return set_losses(logits, batch["target"], self.label_smoothing), None
        return class_losses(logits, batch, self.label_smoothing)


class ClipTask(ImageTask):
    """Base of the tasks that train CLIP's towers together: texts are encoded once per optimizer step or evaluation."""

    zero_shot = compares_names = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer: Tokenizer
        self._class_features: Tensor | None = None

    def build(self) -> nn.Module:
        """Load the CLIP model, and prepare its texts."""
        clip = load_clip(self.name, self.pretrained, seed=self.seed)
        self.identity = clip.identity
        self.take_texts(clip.model, clip.tokenizer)
        return clip.model

    def build_on(self, other: ImageTask) -> None:
        """Prepare the texts of this task's own classes."""
        assert isinstance(other, ClipTask)
        self.take_texts(other.model, other.tokenizer)

    @abstractmethod
    def take_texts(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Prepare the texts of the classes for a model of open_clip without an adapter, and its tokenizer."""

    def image_tower(self) -> nn.Module:
        """Return the image tower without the text tower."""
        return ImageTower(self.model)

    def text_model(self) -> tuple[nn.Module, Tokenizer]:
        """Return the trained model and its tokenizer."""
        return self.unload(), self.tokenizer

    def head_weight(self) -> Tensor:
        """Return the scaled features of all classes."""
        return self.scale() * self.class_features()

    def scale(self) -> Tensor:
        """Return the factor of the similarities, a scalar."""
        factor: Tensor = self.model.logit_scale.exp()  # type: ignore[operator]
        return factor

    @abstractmethod
    def class_features(self) -> Tensor:
        """Return the features of all classes (C, e), of unit length, encoded at the first use in an evaluation."""

    @abstractmethod
    def features_of(self, classnames: list[str], templates: Sequence[str] = ()) -> Tensor:
        """Return the features (C, e) of any classes, of unit length, made as in an evaluation."""

    def percent_among(
        self,
        classnames: list[str],
        batches: Iterable[tuple[Tensor, Tensor]],
        tick: Callable[[int], None] = lambda _: None,
        templates: Sequence[str] = (),
    ) -> tuple[float, int]:
        """Return the accuracy in percent among any classes, and the number of images.

        Args:
            classnames: C names.
            batches: Images (b, 3, H, W) with labels (b,).
            tick: Receives the number of images of each batch.
            templates: Prompts of the names, for a task without prompts of its own.
        """
        classes = self.features_of(classnames, templates)
        (percent,), count = zero_shot_accuracy(self.model, classes[None], batches, tick)
        return percent, count

    def shared_features(self, batch: dict[str, Any], encode: Callable[[], Tensor]) -> Tensor:
        """Return text features that the micro-batches of an optimizer step share; the first one calls ``encode``."""
        if batch["micro_batch"] == 0 or self.step_features is None:
            self.step_features = StepFeatures(encode())
        return self.step_features.use(batch["micro_batch"] == batch["micro_batches"] - 1)

    def accumulated_loss(self, batch: dict[str, Any]) -> Tensor | None:
        """Return the gradient of earlier micro-batches for the text tower, at the end of an optimizer step."""
        near = super().accumulated_loss(batch)
        if batch["micro_batch"] < batch["micro_batches"] - 1 or self.step_features is None:
            return near
        carried = self.step_features.pending(self.run.loss_factor())
        self.step_features = None
        return carried if near is None else carried + near

    def start_training(self) -> None:
        """Drop the text features of an interrupted run."""
        self.step_features = None
        self.forget()

    def prepare_evaluation(self) -> None:
        """Merge, unless within a step: its text features wait for a backward pass through the frozen weights."""
        self.forget()
        if self.step_features is None:
            merge(self.model, strict=False)

    def finish_evaluation(self) -> None:
        """Restore the frozen weights, and drop what was encoded with the merged ones."""
        self.forget()
        super().finish_evaluation()

    def forget(self) -> None:
        """Drop what was encoded with other weights."""
        self._class_features = None


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Compute the (b, u) products of (b, e) and (u, e) features in float32, also under autocast.

    Rounded to bfloat16, logits around 25 would be multiples of 1/8.
    """
    with torch.autocast(images.device.type, enabled=False):
        return images.float() @ texts.float().T


def normalize(features: Tensor) -> Tensor:
    """Scale rows to unit length, in float32 so that half precision does not round the similarities."""
    return nn.functional.normalize(features.float(), dim=-1)
