"""Functions that the tasks on images have as methods: classes and their prompts, accuracy, and predictions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from randlora_pl.data.unlabelled import frame_of
from randlora_pl.models import library_of
from randlora_pl.models.folder import OWN, is_folder
from randlora_pl.models.tiny import TINY_TAG
from randlora_pl.tasks.base import AdaptationTask
from randlora_pl.tasks.defaults import check_classes
from randlora_pl.tasks.losses import class_losses
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec

MOST_CLASSES = 50_000
"""The largest published sets have 22,000; a file with more costs minutes of encoding and a table of gigabytes."""


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
        found = _listed(self.evaluation)
        if self.training != self.evaluation:
            return f"{_listed(self.training)} in training; in evaluation {found}"
        if self.drawn and len(self.training) > 1:
            return f"{found}; in training a class has one of them in each step"
        return found


def _listed(texts: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(f'"{text}"' for text in texts[:most]) + ", ..." * (len(texts) > most)
    return shown if len(texts) <= 1 else f"the mean of {len(texts)}: {shown}"


def templates_for(task: AdaptationTask, others: Sequence[str] | None) -> Sequence[str]:
    """Return the templates of other data instead of a task's own, unless there are none or its own were typed."""
    return task.templates if others is None or task.typed_templates else others


def frame(task: AdaptationTask) -> ImageSpec:
    """Return the preprocessing of a task's images: of its adapter file, else of its data or the model."""
    data: Any = getattr(task._trainer, "datamodule", None)
    if task.saved is None and (own := getattr(data, "frame", None)) is not None:
        return cast(ImageSpec, own)
    spec: Any = task.image_spec
    return frame_of({} if task.saved is None else task.saved.metadata, spec)


def needed_weights(name: str, pretrained: str | None) -> str:
    """Return the weights to load.

    By default they are the weights in the name of a timm model, the own ones of a folder or a repository of the Hub,
    and the bundled ones of ``tiny``.

    Raises:
        UserError: The name includes no weights. Random weights must be asked for.
    """
    if pretrained is None and is_folder(name):
        return OWN
    if pretrained is None and name != "tiny":
        if library_of(name) == "open_clip" or "." not in name:
            raise UserError(
                f"--model.pretrained is missing: {name} needs weights. Give a tag (`randlora-pl models` shows "
                "some), 'timm' for a timm model, a file, or 'random'."
            )
        return "timm"  # the weights of the tag in the name
    return TINY_TAG if pretrained is None else pretrained


def set_classes(task: AdaptationTask, classnames: list[str], templates: list[str], captions: bool = False) -> None:
    """Name the classes; Lightning's `setup` takes them from the data module.

    Args:
        task: A task on images.
        classnames: Name of each class, or the captions.
        templates: Prompt templates with one ``{}`` each.
        captions: True if the names are captions, so that recall is what counts.

    Raises:
        UserError: If there are fewer than two, or the task was built for others or cannot do with captions.
    """
    if captions and not task.takes_captions:
        raise UserError(f"{type(task).__name__} needs classes, but these are captions. Use VisionLanguageTask.")
    task.retrieval = captions
    check_classes(task, classnames)
    if len(classnames) > MOST_CLASSES and not captions:  # each is encoded, and counted against each other one
        raise UserError(f"there are {len(classnames):,} classes; at most {MOST_CLASSES:,} are possible.")
    task.classnames, task.templates = list(classnames), list(templates)
    for stage in ("val", "test"):
        accuracy = MulticlassAccuracy(len(classnames), average="micro", validate_args=False)
        task.metrics[f"{stage}_meters"] = MetricCollection({"loss": MeanMetric(), "acc": accuracy})


def setup(task: AdaptationTask, stage: str) -> None:
    """Take class names and prompts from the data module; for the classes of a loaded file, its prompts.

    Typed prompts come first, then those that were typed for the loaded file, whatever its classes.

    Raises:
        UserError: If there are none, the task was built for others, or it has no use for typed prompts.
    """
    datamodule = getattr(task.trainer, "datamodule", None)
    if datamodule is None:
        if not task.classnames:
            raise UserError("the task needs a data module, or set_classes(classnames, templates) first.")
        return
    typed, templates = getattr(datamodule, "typed_templates", False), datamodule.templates
    if task.backbone is None or datamodule.classnames != task.classnames:
        captions = getattr(getattr(datamodule, "row", None), "captions", False)
        named: Any = task
        saved = {} if task.saved is None else task.saved.metadata
        if typed:
            if not hasattr(task, "use_typed_prompts"):
                kind = type(task).__name__
                raise UserError(f"--data.templates: {kind} reads no texts. Remove it, or use --model TextHeadTask.")
            named.use_typed_prompts()
        elif (typed := saved.get("typed_templates", False)) or saved.get("classnames") == datamodule.classnames:
            templates = saved["templates"]
        task.typed_templates = typed
        named.set_classes(datamodule.classnames, templates, captions)
    elif typed and not (task.typed_templates and templates == task.templates):
        raise UserError("--data.templates: the task was built for other prompts. Create a new task for these.")


def evaluate(task: AdaptationTask, batch: dict[str, Any], stage: str, name: str) -> dict[str, Tensor]:
    """Update and log loss and accuracy of the samples that count (weight above zero)."""
    logits = task.class_logits(batch["image"]).float()
    counts, meters, labels = batch["weight"] > 0, task.metrics[f"{stage}_meters"], batch["label"]
    assert isinstance(meters, MetricCollection)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    if batch.get("whole"):  # else a GPU is waited for
        meters["loss"].update(losses)
        meters["acc"].update(logits, labels)
    elif counts.any():
        meters["loss"].update(losses[counts])
        meters["acc"].update(logits[counts], labels[counts])
    for key, metric in meters.items():
        task.log(f"{name}/{key}", metric, on_step=False, on_epoch=True, prog_bar=stage == "val")
    return {"logits": logits, "label": labels, "index": batch["index"], "weight": batch["weight"]}


def sample_losses(task: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy over all classes (see `class_losses`)."""
    return class_losses(task.class_logits(batch["image"]), batch, task.label_smoothing)


def predict_step(task: AdaptationTask, batch: dict[str, Any], batch_idx: int) -> Tensor:
    """Return class probabilities, (b, classes) float32; NaN for images that were skipped or only fill a batch.

    The batch is of the data module's test images, or of `randlora_pl.data.open_images`.
    """
    probabilities = task.class_logits(batch["image"]).float().softmax(1)
    return probabilities.masked_fill(batch["weight"][:, None] == 0, float("nan"))
