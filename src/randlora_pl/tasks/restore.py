"""From an adapter file back to a task that predicts."""

from pathlib import Path
from typing import Any

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.adapters.io.save_load import place_adapter
from randlora_pl.tasks.base import AdaptationTask
from randlora_pl.tasks.linear_head import LinearHeadTask
from randlora_pl.tasks.text_head import TextHeadTask
from randlora_pl.tasks.vision_language import VisionLanguageTask
from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.weights_files import find_weights

ImageTask = VisionLanguageTask | TextHeadTask | LinearHeadTask
"""The tasks on images."""

TASKS: dict[str, type[ImageTask]] = {task.__name__: task for task in (VisionLanguageTask, TextHeadTask, LinearHeadTask)}


def load_task(folder: str | Path, **overrides: Any) -> ImageTask:
    """Build the task that an adapter folder was saved from, with its adapter, head and classes.

    Args:
        folder: The adapter folder.
        overrides: Constructor arguments to change, for example ``pretrained`` where a weights file moved.

    Returns:
        The task in eval mode, on the CPU, ready for ``class_logits``.

    Raises:
        UserError: If the folder was written by no task, or its base model is another one.
    """
    file = read_adapter(folder)
    task = plain_task(file, **overrides)
    make_ready(task, file)
    return task


def make_ready(task: AdaptationTask, file: AdapterFile) -> None:
    """Build a task's backbone and load its adapter and head, merged for evaluation."""
    task.saved = file
    task.configure_model()
    place_adapter(task.model, file)
    task.load_head(file.extra)
    task.eval()
    task.prepare_evaluation()


def plain_task(file: AdapterFile, **overrides: Any) -> ImageTask:
    """Return the task of an adapter with its classes, before its backbone is built.

    Raises:
        UserError: If it was written by no task.
    """
    metadata = file.metadata
    kind = TASKS.get(metadata.get("task", ""))
    if file.config.get("base_model", {}).get("library") == "transformers":
        raise UserError(
            f"{file.path} belongs to a language model: `predict --texts FILE` takes it, and in Python "
            "load_language_task of randlora_pl.language."
        )
    if kind is None:
        raise UserError(f"{file.path} says nothing of a task; it can be loaded with load_adapter(model, folder) only.")
    if "pretrained" not in overrides and (weights := find_weights(file.config.get("base_model", {}), file.path)):
        overrides["pretrained"] = weights
    arguments = {**metadata["arguments"], **overrides}
    check_arguments(kind, arguments, f"{file.path}, arguments of {kind.__name__}")
    task = kind(**arguments, adapter=file.adapter)
    task.set_classes(metadata["classnames"], metadata["templates"], metadata.get("captions", False))
    return task
