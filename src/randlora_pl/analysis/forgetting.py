"""Forgetting of a fine-tuned CLIP: zero-shot accuracy on other datasets, before and after fine-tuning."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters import AdapterFile
from randlora_pl.utils.errors import UserError

TASKS = ("VisionLanguageTask", "TextHeadTask")
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
    """Raise an error for adapters without a text head.

    Raises:
        UserError: The adapter has no text head, was trained on captions, or was not saved by a task.
    """
    task = file.metadata.get("task")
    if task not in TASKS:
        raise UserError(
            f"{file.path} was trained by {task or 'no task'}. Zero-shot accuracy on other datasets needs a CLIP with a "
            f"text head ({' or '.join(TASKS)})."
        )
    if file.metadata.get("captions"):
        raise UserError(f"{file.path} was trained on captions and has no prompt for class names.")


def prompts_of(file: AdapterFile, templates: list[str]) -> list[str]:
    """Return the evaluation prompts of the adapter's task: its caption, or the dataset's templates to average."""
    arguments = dict(file.metadata["arguments"])
    captioned = file.metadata["task"] == "VisionLanguageTask" and arguments.get("eval_prompts", "caption") == "caption"
    return [str(arguments["caption"])] if captioned else templates


@torch.inference_mode()
def accuracy(
    model: Any, heads: Tensor, batches: Iterable[tuple[Tensor, Tensor]], tick: Callable[[int], None] = lambda _: None
) -> tuple[list[float], int]:
    """Return the zero-shot accuracy in percent of each head, and the number of images.

    Args:
        model: Model with ``encode_image``.
        heads: Embeddings of the classes (heads, C, e), of unit length.
        batches: Images (b, 3, H, W) with labels (b,).
        tick: Receives the number of images of each batch.
    """
    right, count = torch.zeros(len(heads), dtype=torch.int64), 0
    for images, labels in batches:
        features = F.normalize(model.encode_image(images).float(), dim=-1)
        right += ((features @ heads.transpose(1, 2)).argmax(2) == labels).sum(1).cpu()
        count += len(labels)
        tick(len(labels))
    return [100 * number / max(1, count) for number in right.tolist()], count
