"""Zero-shot accuracy of CLIP, beside published ones and after fine-tuning.

The accuracies of averaged templates and of one prompt are over the same embeddings. Forgetting of a fine-tuned CLIP is
its zero-shot accuracy on other datasets, before and after.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from randlora_pl.adapters import AdapterFile
from randlora_pl.data import ImageData
from randlora_pl.data.unlabelled import batches, framed
from randlora_pl.lab.paper import rows
from randlora_pl.models import LoadedClip, cached_text_head, encode_prompts
from randlora_pl.models.text import zero_shot_accuracy
from randlora_pl.tasks import restore
from randlora_pl.utils.errors import UserError

SOURCE = (
    "github.com/fredzzhang/atlas (commit 557d7fb), its stored zero-shot test accuracies of OpenAI's CLIP "
    "with averaged templates"
)

OTHER_SPLIT = ("eurosat", "caltech101", "caltech256")
"""Datasets without an official split: the published accuracies are of other test images."""


def published(model: str, pretrained: str, dataset: str) -> float | None:
    """Return the published accuracy in percent, None where there is none.

    Args:
        model: Architecture, after its activation has been matched to the weights.
        pretrained: Tag of the weights.
        dataset: A dataset of the catalog.
    """
    known = {row["dataset"]: row for row in rows("zero_shot.csv")}
    accuracy = known.get(dataset, {}).get(model) if pretrained == "openai" else None
    return float(accuracy) if accuracy else None


SINGLE = "An image of {}"
"""The single prompt: the caption of the paper's vision-language runs."""


@dataclass(frozen=True)
class ZeroShot:
    """Accuracies in percent of one dataset's test images.

    Attributes:
        expected: Number of images of the complete dataset; None if it is unknown.
        ensemble: Accuracy with the averaged templates.
        single: Accuracy with `SINGLE`.
    """

    images: int
    expected: int | None
    classes: int
    templates: int
    ensemble: float
    single: float
    published: float | None

    @property
    def difference(self) -> float | None:
        """Our accuracy minus the published one, in points."""
        return None if self.published is None else self.ensemble - self.published

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, to two digits like the published accuracies."""
        facts = asdict(self) | {"difference": self.difference}
        return {name: round(value, 2) if isinstance(value, float) else value for name, value in facts.items()}


def prepare(clip: LoadedClip, dataset: str, root: Path, batch_size: int) -> ImageData:
    """Return the test images of a dataset, prepared as the model wants them.

    Raises:
        UserError: The data are missing or damaged.
    """
    data = framed({"dataset": dataset, "root": str(root)}, clip.image, batch_size)
    if data.several:
        what = f"{data.row.title}: its images have several labels, and CLIP ranks one class against the others."
        raise UserError(what, "Train on them: randlora-pl fit --model LinearHeadTask")
    data.setup("test")
    return data


def evaluate(
    clip: LoadedClip, data: ImageData, device: torch.device, tick: Callable[[int], None] = lambda _: None
) -> ZeroShot:
    """Encode the test images once and compare them with both sets of class embeddings, in fp32.

    Raises:
        UserError: An image cannot be read.
    """
    model: Any = clip.model.eval()
    averaged = cached_text_head(model, clip.tokenizer, data.classnames, data.templates, device, clip.identity)
    single = encode_prompts(model, clip.tokenizer, data.classnames, [SINGLE], device)
    images = batches(data, data.samples("test"), data.eval_batch_size, device)
    (ensemble, alone), count = zero_shot_accuracy(model, torch.stack((averaged, single)), images, tick)
    known = published(clip.identity.name, clip.identity.pretrained, data.row.name)
    return ZeroShot(count, data.row.counts.get("test"), data.num_classes, len(data.templates), ensemble, alone, known)


TASKS = ("VisionLanguageTask", "TextHeadTask", "PromptTask")
"""Tasks whose classifier is computed from class names, so that it can be computed for other classes."""


@dataclass(frozen=True)
class Forgetting:
    """Accuracy of one adapter on one dataset's test images, in percent, before and after fine-tuning."""

    dataset: str
    images: int
    classes: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """Change in percentage points; negative values mean forgetting."""
        return self.after - self.before


def check_task(file: AdapterFile) -> None:
    """Refuse an adapter that cannot name the classes of other datasets.

    Raises:
        UserError: The adapter has no text head, was trained on captions, was not saved by a task, or has prompts that
            depend on the image or are of each class alone.
    """
    task = file.metadata.get("task")
    if task not in TASKS:
        raise UserError(
            f"{file.path} was trained by {task or 'no task'}. Zero-shot accuracy on other datasets needs a CLIP with a "
            f"text head ({' or '.join(TASKS)})."
        )
    if prompts := file.metadata["arguments"].get("prompts"):
        options = prompts["options"]
        if prompts["method"] == "CoCoOp" or options.get("class_specific"):
            raise UserError(f"{file.path}: its prompts ({prompts['method']}) cannot name classes of other datasets.")
    if file.metadata.get("captions"):
        raise UserError(f"{file.path} was trained on captions and has no prompt for class names.")


def prompts_of(file: AdapterFile, templates: list[str]) -> list[str]:
    """Return the evaluation prompts of the adapter's task: its caption, typed prompts, or the dataset's to average.

    For learned prompts they are the words that these start from, which the base model is tested with.
    """
    used = restore.plain_task(file).used_prompts(templates)
    if used.learned and not used.training:
        words = file.metadata["arguments"].get("prompts", {"options": {}})["options"].get("words")
        return [f"{words or 'a photo of a'} {{}}."]
    return list(used.evaluation or used.training)
