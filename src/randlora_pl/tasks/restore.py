"""From an adapter file back to a task that predicts."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.adapters.io.save_load import place_adapter
from randlora_pl.models.folder import check_config
from randlora_pl.tasks.base import AdaptationTask
from randlora_pl.tasks.files import task_names
from randlora_pl.tasks.images import ImageTask, UsedPrompts
from randlora_pl.tasks.linear_head import LinearHeadTask
from randlora_pl.tasks.prompt.task import PromptTask
from randlora_pl.tasks.text_head import TextHeadTask
from randlora_pl.tasks.vision_language import VisionLanguageTask
from randlora_pl.utils import own_classes
from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError, brief, errors_in
from randlora_pl.utils.files.weights_files import base_arguments

TASKS: dict[str, type[ImageTask]] = {
    task.__name__: task for task in (VisionLanguageTask, TextHeadTask, LinearHeadTask, PromptTask)
}
"""The tasks on images by name."""


def prompts_of(file: AdapterFile) -> UsedPrompts:
    """Return the prompts of an adapter, none if no task on images saved it.

    Raises:
        UserError: A prompt is damaged.
    """
    if task_class(file) is None:
        return UsedPrompts()
    stored = file.metadata.get("prompts", {})
    found = UsedPrompts(**{each.name: stored[each.name] for each in fields(UsedPrompts) if each.name in stored})
    for text in (*found.training, *found.evaluation):
        if "{}" not in text:
            raise UserError(
                f"{file.path} is damaged or was changed: its prompt {brief(text)} has no {{}} for the class."
            )
    return found


def task_class(file: AdapterFile) -> type[ImageTask] | None:
    """Return the class of the task on images that saved an adapter; None if none did."""
    return TASKS.get(file.metadata.get("task", ""))


Kind = TypeVar("Kind", bound=AdaptationTask)
Task = TypeVar("Task", bound=type[AdaptationTask])


def register(kind: Task) -> Task:
    """Make a task of your own loadable from adapter files, which store its import path; also as a decorator.

    ``--import MODULE`` and the entry-point group ``randlora_pl.tasks`` do the same for commands.

    Examples:
        >>> from randlora_pl.tasks import TextHeadTask, register
        >>> @register
        ... class DoubledLoss(TextHeadTask):
        ...     def sample_losses(self, batch):
        ...         losses, right = super().sample_losses(batch)
        ...         return 2 * losses, right

    Args:
        kind: A subclass of `AdaptationTask`.

    Returns:
        The same class.

    Raises:
        UserError: It is not a subclass of `AdaptationTask`, or has the name of a task of this program.
    """
    own_classes.TASKS.register(kind, AdaptationTask, task_names())  # type: ignore[type-abstract]
    return kind


def find_task(path: str) -> type[AdaptationTask]:
    """Return a task of a user or a package by its import path.

    Raises:
        UserError: It is neither imported by name, nor registered, nor an entry point.
    """
    return own_classes.TASKS.find(path, AdaptationTask, task_names())  # type: ignore[type-abstract]


def load_task(folder: str | Path, **overrides: Any) -> ImageTask:
    """Build the task that an adapter folder was saved from, with its adapter, head and classes.

    Examples:
        >>> task = load_task("runs/one/adapter")
        >>> task.class_logits(digits).shape
        torch.Size([2, 10])

    Args:
        folder: The adapter folder.
        overrides: Constructor arguments to change, for example ``pretrained`` if a weights file moved.

    Returns:
        The task in eval mode, on the CPU, ready for ``class_logits``.

    Raises:
        UserError: If the folder was written by no task, or its base model is another one.
    """
    file = read_adapter(folder)
    return make_ready(plain_task(file, **overrides), file)


def make_ready(task: Kind, file: AdapterFile) -> Kind:
    """Build a task's backbone and load its adapter and head, merged for evaluation; return the task."""
    task.configure_model()
    check_config(file.config.get("base_model", {}), task.identity.config_sha256, file.path)
    place_adapter(task.model, file)
    task.load_head(file.extra)
    task.eval()
    task.prepare_evaluation()
    return task


def make_task(file: AdapterFile, kinds: Mapping[str, type[Kind]], overrides: Mapping[str, Any]) -> Kind:
    """Return the task of an adapter by its name among ``kinds``, with the file, before its classes are set.

    Raises:
        UserError: If it was written by none of them, or its arguments are unknown.
    """
    own, name = file.metadata.get("task_class"), file.metadata.get("task", "")
    kind = kinds.get(name)
    if own is not None and (kind is not None or name == own):
        with errors_in(file.path):
            kind = cast(type[Kind], find_task(own))
    if kind is None:
        what = f"{file.path} was saved by none of the tasks {', '.join(kinds)}"
        raise UserError(f"{what}; in Python, load_adapter(model, folder) loads it.")
    arguments = {**kind.arguments(file.metadata["arguments"], file.path), **overrides}
    check_arguments(kind, arguments, f"{file.path}, arguments of {kind.__name__}")
    try:
        task = kind(**arguments, adapter=file.adapter)
    except TypeError as error:  # a class of a user may have got a required option
        raise UserError(f"{file.path}: {kind.__name__} does not take its arguments ({error}).") from None
    task.saved = file
    return task


def plain_task(file: AdapterFile, **overrides: Any) -> ImageTask:
    """Return the task of an adapter with its classes, before its backbone is built.

    Raises:
        UserError: If it was written by no task on images.
    """
    metadata, base = file.metadata, file.config.get("base_model", {})
    if base.get("library") == "transformers":
        raise UserError(
            f"{file.path} belongs to a language model: `predict --texts FILE` takes it, and in Python "
            "load_language_task of randlora_pl.language."
        )
    if "pretrained" not in overrides:
        overrides = base_arguments(base, file.path) | overrides
    task = make_task(file, TASKS, overrides)
    task.typed_templates = metadata.get("typed_templates", False)
    task.set_classes(metadata["classnames"], metadata["templates"], metadata.get("captions", False))
    return task
