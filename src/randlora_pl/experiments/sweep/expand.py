"""Check of a cell's config without weights: refuse what cannot run, and count."""

import inspect
import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from randlora_pl.adapters import inject
from randlora_pl.adapters.io.save_load import make_adapter
from randlora_pl.experiments.sweep.description import Tree
from randlora_pl.experiments.sweep.texts import is_text, text_steps
from randlora_pl.language.tasks.common import default_targets
from randlora_pl.language.tasks.meta import meta_backbone
from randlora_pl.language.tasks.restore import TASKS as LANGUAGE
from randlora_pl.language.tasks.restore import LanguageTask
from randlora_pl.models import ImageTower, library_of, meta_clip, meta_vit
from randlora_pl.tasks import ImageTask, LinearHeadTask, VisionLanguageTask
from randlora_pl.tasks.base import AdaptationTask
from randlora_pl.tasks.restore import TASKS as VISION
from randlora_pl.utils.errors import UserError, errors_in, near


@dataclass(frozen=True)
class Counts:
    """Cost of a model.

    Attributes:
        trainable: Parameters that train, a head left out.
        total: All parameters of the backbone with its adapter.
    """

    trainable: int
    total: int


def task_of(tree: Tree) -> AdaptationTask | None:
    """Return the task that a config describes; None for a class outside this project.

    Raises:
        UserError: An option is impossible.
    """
    model = tree["model"]
    arguments = dict(model.get("init_args") or {})
    kind = _kind(tree)
    described = _described(arguments.pop("adapter"))
    if kind is None or described is None:
        return None
    adapter = make_adapter(described["method"], described["options"], "model.adapter", "see randlora-pl adapters NAME")
    task: AdaptationTask = _made(kind, arguments | {"adapter": adapter}, "model")
    return task


def data_of(tree: Tree) -> Any:
    """Return the data module that a config describes; nothing is read.

    Raises:
        UserError: An option is impossible.
    """
    package, _, name = getattr(_kind(tree), "data_module", AdaptationTask.data_module).rpartition(".")
    return _made(getattr(import_module(package), name), dict(tree.get("data", {})), "data")


def _made(kind: Any, arguments: dict[str, Any], where: str) -> Any:
    """Make an object of a class, or name the argument it does not take in a one-line error.

    Args:
        kind: The class.
        arguments: Arguments by name.
        where: The place that they come from, for messages.

    Raises:
        UserError: An argument is unknown or impossible.
    """
    known = inspect.signature(kind).parameters
    for key in arguments:
        if key not in known:
            raise UserError(f"{where}: {kind.__name__} has no option {key!r}.{near(str(key), known)}")
    try:
        with errors_in(where):
            return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {kind.__name__} does not take these options ({error}).") from error


def _kind(tree: Tree) -> type[AdaptationTask] | None:
    kinds: dict[str, type[AdaptationTask]] = {**VISION, **LANGUAGE}
    return kinds.get(_short(tree["model"]))


def counts(tree: Tree) -> Counts | None:
    """Count on the meta device; None for a class outside this project, or a model of unknown shape.

    Args:
        tree: A cell's config.

    Raises:
        UserError: The adapter does not fit the model, or trains nothing.
    """
    task = task_of(tree)
    if task is None:
        return None
    if isinstance(task, LanguageTask):
        return _text_counts(task)
    assert isinstance(task, ImageTask)
    clip = library_of(task.name) == "open_clip"
    model = meta_clip(task.name) if clip else meta_vit(task.name, getattr(task, "img_size", None))
    if clip and not isinstance(task, VisionLanguageTask):
        model = ImageTower(model)
    inject(model, task.adapter, task.targets)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trainable and not isinstance(task, LinearHeadTask):
        raise UserError(f"{task.adapter.method()} trains nothing there; give it task: LinearHeadTask.")
    return Counts(trainable, sum(parameter.numel() for parameter in model.parameters()))


def _text_counts(task: LanguageTask) -> Counts | None:
    model = meta_backbone(task)
    if model is None:
        return None
    inject(model, task.adapter, default_targets(task, model))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Counts(trainable, sum(parameter.numel() for parameter in model.parameters()))


def _short(node: Any) -> str:
    return str(node["class_path"] if isinstance(node, dict) else node).rpartition(".")[2]


def _described(node: Any) -> dict[str, Any] | None:
    """``{class_path, init_args}`` as the method and options that `make_adapter` takes."""
    name = str(node["class_path"] if isinstance(node, dict) else node)
    if "." in name and not name.startswith("randlora_pl."):
        return None
    options = dict(node.get("init_args") or {}) if isinstance(node, dict) else {}
    if "inner" in options:
        options["inner"] = _described({"class_path": "LoRA"} | options["inner"]) or {}
    return {"method": _short(name), "options": options}


def steps(tree: Tree, classes: int | None, train: int | None) -> int | None:
    """Optimizer steps of a cell from the counts of its data set; None if the counts are unknown.

    Args:
        tree: Config of the cell.
        classes: Classes of its data set.
        train: Training images of its data set.
    """
    from randlora_pl.data.image_splits import FEW_SHOT_EPOCHS
    from randlora_pl.data.sampling.schedule import total_draws

    data = tree.get("data", {})
    limit = tree.get("trainer", {}).get("max_steps", -1)
    planned: int | None
    if is_text(tree):
        planned = text_steps(tree, window(tree))
        if planned is None:
            return None
    elif data.get("steps"):
        planned = int(data["steps"])
    else:
        row = data_of(tree).row
        images = None if train is None else train
        if data.get("shots"):
            images = None if classes is None else min(int(data["shots"]) * classes, train or 10**12)
        elif data.get("fraction") and train is not None:
            images = round(float(data["fraction"]) * train)
        if not images:
            return None
        few = bool(data.get("shots"))
        epochs = data.get("epochs") or (FEW_SHOT_EPOCHS if few else row.epochs)
        least = int(data.get("min_batches_per_epoch", 10)) if few or row.own else 0
        planned = math.ceil(total_draws(images, int(epochs), window(tree), least) / window(tree))
    return planned if limit is None or int(limit) < 0 else min(planned, int(limit))


def window(tree: Tree) -> int:
    """Return the number of images of an optimizer step."""
    accumulated = int(tree.get("trainer", {}).get("accumulate_grad_batches", 1) or 1)
    return int(tree.get("data", {}).get("batch_size", 128)) * accumulated
