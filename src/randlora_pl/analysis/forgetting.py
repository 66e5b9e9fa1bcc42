"""What a tuned CLIP still knows: zero-shot accuracy on other data sets, before and after tuning."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters import AdapterFile
from randlora_pl.utils.errors import UserError

TASKS = ("VisionLanguageTask", "TextHeadTask")
"""Tasks whose classifier is made of class names, so that it can be made for other classes."""


@dataclass(frozen=True)
class Forgetting:
    """Accuracies of one adapter on one data set, in percent.

    Attributes:
        dataset: Name of the data set.
        images: Test images.
        classes: Their classes.
        before: Of the base model.
        after: Of the tuned model, with class names put into the same prompts.
    """

    dataset: str
    images: int
    classes: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """Points gained; below zero: forgotten."""
        return self.after - self.before


def check_task(file: AdapterFile) -> None:
    """Refuses adapters without a text head.

    Raises:
        UserError: It has none, or was written by no task.
    """
    task = file.metadata.get("task")
    if task not in TASKS:
        raise UserError(
            f"{file.path} was trained by {task or 'no task'}: only a CLIP with a text head ({' or '.join(TASKS)}) can "
            "name classes that it was not trained on."
        )
    if file.metadata.get("captions"):
        raise UserError(f"{file.path} was trained on captions; there is no prompt for class names in it.")


def prompts_of(file: AdapterFile, templates: list[str]) -> list[str]:
    """The prompts that the adapter's task evaluates with: its caption, or a data set's templates to average."""
    arguments = dict(file.metadata["arguments"])
    captioned = file.metadata["task"] == "VisionLanguageTask" and arguments.get("eval_prompts", "caption") == "caption"
    return [str(arguments["caption"])] if captioned else templates


@torch.inference_mode()
def accuracy(
    model: Any, classes: Tensor, batches: Iterable[tuple[Tensor, Tensor]], tick: Callable[[int], None] = lambda _: None
) -> tuple[float, int]:
    """Share of the images, in percent, whose embedding is nearest to that of their class, and how many there are.

    Args:
        model: Has ``encode_image``.
        classes: Embeddings of the classes (C, e) of unit length.
        batches: Images (b, 3, H, W) with labels (b,).
        tick: Told how many images have just been tested.
    """
    right = count = 0
    for images, labels in batches:
        features = F.normalize(model.encode_image(images).float(), dim=-1)
        right += int(((features @ classes.T).argmax(1) == labels).sum())
        count += len(labels)
        tick(len(labels))
    return 100 * right / max(1, count), count
