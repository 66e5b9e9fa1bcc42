"""Forgetting of a fine-tuned CLIP: its zero-shot accuracy on other datasets, before and after."""

from dataclasses import dataclass

from randlora_pl.adapters import AdapterFile
from randlora_pl.tasks import restore
from randlora_pl.utils.errors import UserError

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
    """Refuse an adapter that cannot predict the classes of other datasets.

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
    prompts = file.metadata["arguments"].get("prompts")
    if prompts and (prompts["method"] == "CoCoOp" or prompts["options"].get("class_specific")):
        raise UserError(f"{file.path}: its prompts ({prompts['method']}) cannot describe classes of other datasets.")
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
