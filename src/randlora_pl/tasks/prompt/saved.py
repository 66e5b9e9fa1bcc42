"""Functions that `PromptTask` has as methods: adapter folders, other classes, and facts for results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randlora_pl import prompts as learners
from randlora_pl.adapters import AdapterFile, adapted_layers
from randlora_pl.adapters.described import Described, make
from randlora_pl.prompts import PromptLearner
from randlora_pl.tasks import files, images
from randlora_pl.tasks.losses import normalize
from randlora_pl.tasks.prompt.decoupled import DePT
from randlora_pl.tasks.prompt.regulation import SelfRegulation
from randlora_pl.tasks.prompt.second_stage import scaled_features
from randlora_pl.tasks.prompt.tip import Cache, TipAdapter
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.run_results import flat

_LEARNERS = {name: getattr(learners, name) for name in learners.__all__}
PARTS: dict[str, dict[str, type[Described]]] = {
    "prompts": {
        name: kind for name, kind in _LEARNERS.items() if issubclass(kind, PromptLearner) and kind is not PromptLearner
    },
    "head": {"DePT": DePT, "TipAdapter": TipAdapter},
    "regulation": {"SelfRegulation": SelfRegulation},
}
"""Options of `PromptTask` that are objects, and their classes by name."""


def constructor(task: Any) -> dict[str, Any]:
    """Return the constructor's arguments as JSON values (see `files.constructor`), without the rate of a head."""
    values = files.constructor(task)
    values.pop("head_learning_rate", None)  # a subclass may fix it
    return {name: value.describe() if isinstance(value, Described) else value for name, value in values.items()}


def arguments(saved: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Return arguments from a file, with learner, head and regulation as objects.

    Raises:
        UserError: One of them is unknown, or its options do not fit.
    """
    found = {name: make(PARTS[name], saved[name], source) for name in PARTS if saved.get(name) is not None}
    return {**saved, **found}


def used_prompts(task: Any, templates: Sequence[str] | None = None) -> images.UsedPrompts:
    """Return the prompts of a task, whatever the templates: the words of `Fixed`, else none."""
    learner: PromptLearner = task.prompts
    if not isinstance(learner, learners.Fixed):
        return images.UsedPrompts(learned=learner.method())
    words = [learner.template]
    if task.classifier_steps:
        return images.UsedPrompts(words, learned="classifier_steps")
    return images.UsedPrompts(words, words)


def use_typed_prompts(task: Any) -> None:
    """Refuse them: the prompts are an option of the task.

    Raises:
        UserError: Always.
    """
    option = "words" if task.prompts.learns else "template"
    raise UserError(
        f"--data.templates: PromptTask has prompts of its own. Set --model.prompts.{option} instead, or use --model "
        "VisionLanguageTask."
    )


def head_tensors(task: Any) -> dict[str, Tensor]:
    """Return the features of the classes, the learned tokens and the second head, by the names of the file."""
    found = {} if task.prompts.per_image else {"head": task.class_head}
    found |= {f"prompts.{name}": value for name, value in task.learned.named_parameters()}
    if task.decoupled is not None:
        found |= {f"decoupled.{name}": value for name, value in task.decoupled.state_dict().items()}
    return found


def load_head(task: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of `head_tensors` back from an adapter folder; the texts need no encoding then."""
    files.load_head(task, tensors)
    if task.classifier is not None:
        task.classifier.data = normalize(task.class_head)
    task.saved_head = not task.prompts.per_image


def save(task: Any, folder: str | Path, summary: Any = None) -> Path:
    """Write the adapter folder (see `files.save`), with the class features that an evaluation would have."""
    check_own(task)
    if not task.prompts.per_image:
        training, half = task.training, any(each.dtype == torch.bfloat16 for each in task.model.parameters())
        merged = any(layer.merged for layer in adapted_layers(task.model).values())
        task.eval()
        task.prepare_evaluation()
        with torch.no_grad(), torch.autocast(task.device.type, torch.bfloat16, enabled=half):  # as in the training
            task.class_head = scaled_features(task)
        if not merged:
            task.finish_evaluation()
        task.train(training)
    return files.save(task, folder, summary)


def classes_of(file: AdapterFile | None, classnames: list[str], prompts: PromptLearner) -> list[str]:
    """Return the classes that prompts are learned for; those in a saved adapter if one is loaded."""
    own = list(classnames) if file is None else list(file.metadata.get("classnames") or classnames)
    check_classes(own, classnames, prompts)
    return own


def check_classes(own: list[str], classnames: list[str], prompts: PromptLearner) -> None:
    """Refuse other classes than those that prompts were learned for, if each class has its own.

    Raises:
        UserError: Prompts of each class alone cannot name them.
    """
    if prompts.class_specific and own != list(classnames):
        raise UserError(
            f"class-specific prompts were learned for {own[:3]}..., the data has {list(classnames)[:3]}.... Train with "
            "--model.prompts.class_specific false to name others."
        )


def check_own(task: Any) -> None:
    """Refuse to train or to save a second head or a classifier with other classes than its own.

    Raises:
        UserError: The task names other classes now.
    """
    if task.classnames != task.own_classes and not (task.decoupled is task.classifier is None):
        own, now = task.own_classes[:3], task.classnames[:3]
        raise UserError(f"the second head is of the classes {own}..., not of {now}...: make a new task for these.")


def trained_state(task: Any) -> dict[str, Tensor]:
    """Return what trains (see `files.trained_state`), and the factors that a search has chosen."""
    factors = {"decoupled.factors": task.decoupled.factors} if isinstance(task.decoupled, Cache) else {}
    return files.trained_state(task) | factors


def use_sum(task: Any, others: Mapping[str, Any], name: str) -> None:
    """Encode the classes again, for weights that are a sum of several updates.

    Args:
        task: The task whose prompts are used.
        others: The other tasks by name.
        name: Name of the task.

    Raises:
        UserError: Another task has learned other prompts.
    """
    own = _learned(task)
    for theirs, other in others.items():
        there = _learned(other)
        equal = task.prompts.describe() == other.prompts.describe() and own.keys() == there.keys()
        if not equal or any(not torch.equal(value, there[key]) for key, value in own.items()):
            raise UserError(
                f"{name} and {theirs} have different prompts or second heads, so a sum has none. Remove the weights to "
                "predict with each."
            )
    task.saved_head = False


def _learned(task: Any) -> dict[str, Tensor]:
    return {key: value for key, value in head_tensors(task).items() if key != "head" or task.classifier is not None}


def parameter_parts(task: Any) -> dict[str, int]:
    """Return the numbers that train, by part: adapter, prompts, head; keys of the rate 0 are none."""
    parts = {"prompts": task.learned, "head": task.decoupled if task.head and task.head.rate_factor else None}
    counts = {name: sum(each.numel() for each in part.parameters()) for name, part in parts.items() if part is not None}
    counts["classifier"] = 0 if task.classifier is None else task.classifier.numel()
    return {"adapter": task.report.trainable, **{name: count for name, count in counts.items() if count}}


def rates(task: Any) -> dict[str, float]:
    """Return the learning rates of prompts and second head by name."""
    found = {"prompts": task.prompt_learning_rate} if task.prompts.learns else {}
    name = "head" if task.head is not None else "classifier"
    return found | ({} if task.head_learning_rate is None else {name: task.head_learning_rate})


_RECORDED = ("prompt_learning_rate", "prompt_weight_decay", "optimizer", "schedule", "loss_batch", "classifier_steps")


def facts(task: Any) -> dict[str, Any]:
    """Return prompts, head and regulation with their options under flat keys, for ``results.json``."""
    found: dict[str, Any] = {}
    for name in PARTS:
        if (part := getattr(task, name)) is not None:
            found |= flat(name, {"method": part.method(), **part.options()})
    counts = parameter_parts(task)
    if isinstance(task.decoupled, Cache):
        found |= dict(zip(("cache_alpha", "cache_beta"), task.decoupled.factors.tolist(), strict=True))
    return found | {
        "trainable_parameters": sum(counts.values()),
        "prompt_parameters": counts.get("prompts", 0),
        **{name: getattr(task, name) for name in _RECORDED},
    }
