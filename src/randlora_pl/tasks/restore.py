"""From adapter files back to tasks that predict, of one adapter or of several on one backbone, and tasks by name."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.adapters.save_load import place_adapter
from randlora_pl.models.catalog import check_config
from randlora_pl.tasks.files import Adopted, rooms, task_names
from randlora_pl.tasks.images import ImageTask, UsedPrompts
from randlora_pl.tasks.module import check_hooks
from randlora_pl.tasks.objective import Objective
from randlora_pl.tasks.task_set import TaskSet
from randlora_pl.utils import own_classes
from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError, brief, errors_in
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.weights_files import base_arguments


def prompts_of(file: AdapterFile) -> UsedPrompts:
    """Return the prompts of an adapter, none if no task on images saved it.

    Raises:
        UserError: A prompt is damaged.
    """
    stored = file.metadata.get("prompts", {})
    prompts = UsedPrompts(**{each.name: stored[each.name] for each in fields(UsedPrompts) if each.name in stored})
    for text in (*prompts.training, *prompts.evaluation):
        if "{}" not in text:
            raise UserError(
                f"{file.path} is damaged or was changed: its prompt {brief(text)} has no {{}} for the class."
            )
    return prompts


def task_class(file: AdapterFile) -> type[Objective] | None:
    """Return the task of this program that saved an adapter, or its nearest parent here.

    A task from outside without a parent here is returned if it is imported or registered. None stands for another one.
    """
    name, own = file.metadata.get("task"), file.metadata.get("task_class")
    if own is not None and own == name:
        with suppress(UserError):
            return find_task(own)
    return named_task(name)


def require_classes(metadata: Mapping[str, Any], source: object, use: str) -> None:
    """Refuse an adapter without classes if they are needed.

    Args:
        metadata: The adapter's.
        source: The adapter, for the message.
        use: What needs them, as a noun.

    Raises:
        UserError: A task without classes saved it, or no task.
    """
    if not metadata.get("classnames"):
        task = metadata.get("task")
        why = f"it was trained by {task}" if task else "no task saved it"
        mend = "Use predict, test or adapter merge" if task else "Merge it in Python, by merge_and_unload(model)"
        raise UserError(f"{source} has no classes ({why}), and {use} needs them. {mend}.")


def named_task(name: object) -> type[Objective] | None:
    """Return the task of this program with a name; None if there is none."""
    package = next((each for each in rooms() if name in each.__all__), None)
    kind = getattr(package, str(name), None)
    return kind if isinstance(kind, type) and issubclass(kind, Objective) else None


def adopting(part: Adopted) -> type[Objective]:
    """Return the task for an adapter of another program, which trained this part of a model."""
    return next(kind for name in task_names() if (kind := named_task(name)) is not None and kind.adopts == part)


Kind = TypeVar("Kind", bound=Objective)
Task = TypeVar("Task", bound=type[Objective])


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
        kind: A subclass of `Objective`.

    Returns:
        The same class.

    Raises:
        UserError: It is not a subclass of `Objective`, has the name of a task of this program, or defines a hook of
            Lightning.
    """
    own_classes.TASKS.register(kind, Objective, task_names())  # type: ignore[type-abstract]
    check_hooks(kind)
    return kind


def find_task(path: str) -> type[Objective]:
    """Return a task of a user or a package by its import path.

    Raises:
        UserError: It is neither imported by name, nor registered, nor an entry point; or it defines a hook of
            Lightning.
    """
    kind = own_classes.TASKS.find(path, Objective, task_names())  # type: ignore[type-abstract]
    check_hooks(kind)
    return kind


def load_task(folder: str | Path, **overrides: Any) -> ImageTask:
    """Rebuild the task that saved an adapter folder, with its adapter, head and classes.

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
        UserError: If the folder was not written by a task, or its base model differs.
    """
    file = read_adapter(folder)
    return make_ready(plain_task(file, **overrides), file)


def make_ready(task: Kind, file: AdapterFile) -> Kind:
    """Build a task's backbone and load its adapter and head, merged for evaluation; return the task."""
    task.adapt()
    check_config(file.config.get("base_model", {}), task.identity.config_sha256, file.path)
    place_adapter(task.model, file)
    task.load_head(file.extra)
    task.eval()
    task.prepare_evaluation()
    return task


def make_task(file: AdapterFile, base: type[Kind], inputs: str, overrides: Mapping[str, Any]) -> Kind:
    """Return the task of an adapter, with the file, before its classes are set.

    Args:
        file: The adapter.
        base: Base of the task.
        inputs: What such tasks read, for messages.
        overrides: Constructor arguments that take precedence.

    Raises:
        UserError: If it was written by no task below ``base``, or its arguments are unknown.
    """
    own, name, known = file.metadata.get("task_class"), file.metadata.get("task", ""), task_class(file)
    kind = known if known is not None and issubclass(known, base) else None
    if own is not None and (kind is not None or name == own):
        with errors_in(file.path):
            kind = cast(type[Kind], find_task(own))
    if kind is None:
        what = f"{file.path} was not saved by a task on {inputs}"
        raise UserError(f"{what}; in Python, load_adapter(model, folder) loads it.")
    arguments = {**kind.arguments(file.metadata["arguments"], file.path), **overrides}
    check_arguments(kind, arguments, f"{file.path}, arguments of {kind.__name__}")
    try:
        task = kind(**arguments, adapter=file.adapter)
    except TypeError as error:  # a class of a user may have got a required option
        raise UserError(f"{file.path}: {kind.__name__} does not accept its arguments ({error}).") from None
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
            f"{file.path} belongs to a language model: use `predict --texts FILE`, and in Python "
            "load_language_task of randlora_pl.language."
        )
    overrides = {"quantize": None} | overrides  # plain weights merge, and need no further package
    if "pretrained" not in overrides:
        overrides = base_arguments(base, file.path) | overrides
    task = make_task(file, ImageTask, "images", overrides)  # type: ignore[type-abstract]
    task.typed_templates = metadata.get("typed_templates", False)
    kind = metadata.get("captions", False), metadata.get("several_labels", False)
    task.set_classes(metadata["classnames"], metadata["templates"], *kind)
    return task


def backbone_of(task: ImageTask) -> tuple[bool, int | None]:
    """Return what the backbone of a task depends on besides its base model: its tower, and the size of its images."""
    return task.vision_only, getattr(task, "img_size", None)


def load_tasks(adapters: Mapping[str, str | Path | AdapterFile], **overrides: Any) -> dict[str, ImageTask]:
    """Return the tasks of several adapters; adapters of one base model share its weights, which are loaded once.

    Each task has its own head, classes and prompts, and switches the shared backbone to its own adapter whenever it
    uses it, merged. Use one at a time, in a single thread, and not for training.

    Examples:
        >>> tasks = load_tasks({"one": "runs/one/adapter", "two": "runs/two/adapter"})
        >>> logits = tasks["two"].class_logits(digits)

    Args:
        adapters: Adapter folders, files, or what `read_adapter` made of them, by name.
        overrides: Constructor arguments to change in all of them, for example ``pretrained`` where a file moved.

    Returns:
        The tasks by name, in eval mode, on the CPU, ready for ``class_logits``.

    Raises:
        UserError: If one was not written by a task, or its base model is not the one in the file.
    """
    files = {name: each if isinstance(each, AdapterFile) else read_adapter(each) for name, each in adapters.items()}
    tasks = {name: plain_task(file, **overrides) for name, file in files.items()}
    sets: dict[str, TaskSet] = {}
    for name, task in tasks.items():
        base = json.dumps([files[name].config.get("base_model", {}), *backbone_of(task)], sort_keys=True)
        together = sets[base] = sets.get(base) or TaskSet(task)
        together.load(name, task)
    for task in tasks.values():
        task.eval()
        task.prepare_evaluation()
    return tasks


def weighted_task(tasks: Mapping[str, ImageTask], weights: Mapping[str, float]) -> ImageTask:
    """Return the first of several tasks, with a weighted sum of the updates of all instead of its own.

    Examples:
        >>> tasks = load_tasks({"one": "runs/one/adapter", "two": "runs/two/adapter"})
        >>> both = weighted_task(tasks, {"one": 0.5, "two": 0.5})

    Args:
        tasks: From `load_tasks`.
        weights: A weight for each.

    Raises:
        UserError: If they differ in their base model, kind, classes, prompts or preprocessing, or have trained heads.
    """
    (name, first), *others = tasks.items()
    for theirs, task in others:
        if task.adapters is not first.adapters or type(task) is not type(first):
            raise UserError(
                f"{name} and {theirs} have different base models or tasks, so their updates cannot be added."
            )
        if task.classnames != first.classnames:
            own, their = first.classnames, task.classnames
            raise UserError(
                f"{name} has {len(own)} classes {own[:3]}..., {theirs} has {len(their)} classes {their[:3]}...: a "
                "sum needs the same classes in the same order; remove the weights to predict with each."
            )
        pairs: dict[str, tuple[UsedPrompts | ImageSpec, UsedPrompts | ImageSpec]] = {
            "prompts": (first.used_prompts(), task.used_prompts()),
            "images": (first.frame, task.frame),
        }
        for what, (here, there) in pairs.items():
            if here != there:
                raise UserError(
                    f"{name} and {theirs} have different {what}, so their updates cannot be added: "
                    f"{here.summary()}; and {there.summary()}. Remove the weights to predict with each."
                )
    if others and first.trained_head:
        raise UserError(
            f"{', '.join(tasks)} have linear heads, each trained for its own features, so a sum has no head. "
            "Remove the weights to predict with each."
        )
    first.use_sum(dict(others), name)
    first.choice = dict(weights)
    first.prepare_evaluation()
    return first
