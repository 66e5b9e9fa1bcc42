"""Tasks of several adapters for prediction; adapters of one base model share its backbone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randlora_pl.adapters import AdapterFile, AdapterSet, read_adapter
from randlora_pl.adapters.operations import report_of
from randlora_pl.tasks.images import ImageTask, UsedPrompts
from randlora_pl.tasks.prompt.task import PromptTask
from randlora_pl.tasks.restore import plain_task
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec


def load_tasks(adapters: Mapping[str, str | Path | AdapterFile], **overrides: Any) -> dict[str, ImageTask]:
    """Return the tasks of several adapters; adapters of one base model share its weights, which are loaded once.

    Each task has its own head, classes and prompts, and switches the shared backbone to its own adapter whenever it
    uses it, merged. They take turns: not for several threads at once, and not for training.

    Examples:
        >>> tasks = load_tasks({"one": "runs/one/adapter", "two": "runs/two/adapter"})
        >>> logits = tasks["two"].class_logits(digits)

    Args:
        adapters: Adapter folders, files, or what `read_adapter` made of them, by name.
        overrides: Constructor arguments to change in all of them, for example ``pretrained`` where a file moved.

    Returns:
        The tasks by name, in eval mode, on the CPU, ready for ``class_logits``.

    Raises:
        UserError: If one was written by no task, or its base model is another one than it says.
    """
    files = {name: each if isinstance(each, AdapterFile) else read_adapter(each) for name, each in adapters.items()}
    tasks = {name: plain_task(file, **overrides) for name, file in files.items()}
    first: dict[str, tuple[ImageTask, AdapterSet]] = {}
    for name, task in tasks.items():
        base = _base_of(files[name], task)
        if base in first:
            other, together = first[base]
            task.identity = other.identity
            task.build_on(other)
        else:
            together = AdapterSet(task.build())
            first[base] = task, together
        together.load(name, files[name])
        task.backbone, task.adapters, task.choice = together.model, together, name
        task.report = report_of(task.model)
        task.load_head(files[name].extra)
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
    if isinstance(first, PromptTask):
        first.use_sum(dict(others), name)
    first.choice = dict(weights)
    first.prepare_evaluation()
    return first


def _base_of(file: AdapterFile, task: ImageTask) -> str:
    """Return a key of the backbone: its library, name, weights, towers and image size."""
    base = file.config.get("base_model", {})
    return json.dumps([base, task.vision_only, getattr(task, "img_size", None)], sort_keys=True)
