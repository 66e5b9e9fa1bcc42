"""Functions that tasks have as methods: adapter folders, and checkpoints that hold only what trains.

They take a task of any kind as ``Any``, because `AdaptationTask` imports this module.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randlora_pl.adapters import registry, save_adapter
from randlora_pl.adapters.derived import derived_buffers
from randlora_pl.adapters.io.save_load import make_adapter
from randlora_pl.adapters.kept import kept_buffers, reset_buffers, update_buffers
from randlora_pl.adapters.optimizer import rates_of
from randlora_pl.tasks import procedure
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import option_types
from randlora_pl.utils.own_classes import check_importable, is_own, parent_among, path_of


def check_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: Collection[str], what: str) -> None:
    """Refuse given tensors if a needed one is missing, or one is unknown or has another shape than the own one."""
    missing, unknown = sorted(set(needed) - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        raise UserError(f"{what} does not fit: missing {missing[:3]}, unexpected {unknown[:3]}.")
    for name, value in given.items():
        if value.shape != own[name].shape:
            there, here = tuple(value.shape), tuple(own[name].shape)
            raise UserError(f"{what} does not fit: {name} has shape {there} there and {here} here.")


def load_head(task: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of `head_tensors` back from an adapter folder; refuse tensors that do not fit."""
    own = task.head_tensors()
    check_tensors(tensors, own, own.keys(), "the head")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def start_head(task: Any) -> None:
    """Load the trained head of the LoRA that a training starts from, if the task has one.

    Raises:
        UserError: The file has no head of this kind, or one for other classes.
    """
    if task.start is None or not task.trained_head:
        return
    file = task.start.file
    theirs, kind, own = file.metadata.get("classnames"), file.metadata.get("task"), kind_of(type(task))
    if kind != own:
        raise UserError(f"{file.path} is of {kind}, and has no head for {own}. Set --model {kind}.")
    if theirs != task.classnames:
        raise UserError(
            f"the head of {file.path} is for {len(theirs or [])} classes, and fits no others: here are "
            f"{len(task.classnames)}. Name the data of the LoRA by --data.dataset and --data.root."
        )
    task.load_head(file.extra)


def fingerprint(task: Any) -> str:
    """Return a checksum of the base model, the bases and the state: equal in all processes of a run."""
    digest = hashlib.sha256(f"{task.report.base_hash} {task.report.fingerprint}".encode())
    for name, tensor in (task.trained_state() | _own(task, derived_buffers(task.model))).items():
        value = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def constructor(task: Any) -> dict[str, Any]:
    """Return the options as JSON values, without the adapter and the options of execution."""
    left_out = ("adapter", "frozen_dtype", "torch_compile", "liger")
    return {name: getattr(task, name) for name in option_types(type(task)) if name not in left_out}


def task_names() -> frozenset[str]:
    """Return the names of the classes of this program that a task can have."""
    rooms = (import_module(f"randlora_pl.{name}") for name in ("tasks", "language"))
    return frozenset(name for room in rooms for name in room.__all__) - {"AdaptationTask"}


def kind_of(kind: type) -> str:
    """Return the name of a task's class; from outside, the name of its nearest parent here, or its import path."""
    return parent_among(kind, task_names()) or path_of(kind)


def check_loads_again(task: Any) -> None:
    """Refuse a task whose file could not be loaded again.

    Raises:
        UserError: A class cannot be imported, or a file cannot hold an option.
    """
    registry.check_loads_again(task.adapter)
    if not is_own(type(task)):
        return
    check_importable(type(task))
    try:
        json.dumps(task.constructor())
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{type(task).__name__}: options that a file cannot hold ({error}). Use numbers, texts and lists."
        ) from None


def save(task: Any, folder: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write the adapter folder: trained tensors, head, class names and prompts.

    A task from outside is stored as its nearest parent here, with the path of its own class.

    Args:
        task: The task.
        folder: Folder to write; an older one is replaced at once.
        summary: Metrics of the training, kept in the metadata.
    """
    check_loads_again(task)
    arguments = task.constructor()
    if task.identity.sha256:  # without the local path of the weights
        arguments["pretrained"] = task.identity.pretrained
    if task.identity.config_sha256:  # without the local path of the folder
        arguments["name"] = task.identity.name
    metadata = {
        "task": kind_of(type(task)),
        **({"task_class": path_of(type(task))} if is_own(type(task)) else {}),
        "arguments": arguments,
        "classnames": task.classnames,
        "templates": task.templates,
        "typed_templates": task.typed_templates,
        "captions": task.retrieval,
        **({"prompts": asdict(task.used_prompts())} if hasattr(task, "used_prompts") else {}),
        "training": dict(summary or {}),
    }
    base = task.identity.as_dict()
    return save_adapter(task.model, folder, base_model=base, extra=task.head_tensors(), metadata=metadata)


def trained_state(task: Any) -> dict[str, Tensor]:
    """Return what trains, and the kept buffers that belong to it, by their names in the state dict."""
    return _trained(task) | _own(task, kept_buffers(task.model))


def _trained(task: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}


def _own(task: Any, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return buffers of the model by their names in the task's state dict."""
    wanted = {id(buffer) for buffer in buffers.values()}
    return {name: buffer for name, buffer in task.named_buffers() if id(buffer) in wanted}


def on_save_checkpoint(task: Any, checkpoint: dict[str, Any]) -> None:
    """Keep only what trains and the kept buffers, and add the adapter, the base model and, apart, derived tensors."""
    own, derived, whole = task.trained_state(), _own(task, derived_buffers(task.model)), checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: value for name, value in whole.items() if name in own and name not in derived}
    checkpoint["derived"] = {name: value.detach() for name, value in derived.items()}
    checkpoint["adapter"] = task.adapter.describe()
    checkpoint["base_model"] = _base_model(task)
    checkpoint["rates"] = _rates(task)
    procedure.store(task, checkpoint)


def _base_model(task: Any) -> str:
    """Return name and weights of the base model as text."""
    identity = task.identity
    return f"{identity.library} {identity.name} {identity.pretrained} (weights {task.report.base_hash[:12]})"


def _rates(task: Any) -> dict[str, float]:
    """Return the factors of the learning rate by name, for tensors where it is not 1: they group the optimizer."""
    factors = rates_of(task.model)
    return {name: factors[each] for name, each in task.named_parameters() if factors.get(each, 1.0) != 1}


def on_load_checkpoint(task: Any, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another adapter or base model, with both values, or of more steps than the run has."""
    _check_steps(task, int(checkpoint.get("global_step", 0)))
    if theirs := checkpoint.get("adapter"):
        saved = make_adapter(theirs["method"], theirs["options"], "the checkpoint")  # knows later options, too
        identities = (saved.identity(), task.adapter.identity())
        there, here = ({"method": each["method"], **each["options"]} for each in identities)
        for name, value in here.items():
            if there.get(name) != value:
                raise UserError(
                    f"adapter.{name} is {there.get(name)} in the checkpoint and {value} in this run; "
                    "remove the option, or start a new run."
                )
    own = _base_model(task)
    base = checkpoint.get("base_model", own)
    if base.rpartition("(weights")[2] != own.rpartition("(weights")[2]:  # the same weights may lie elsewhere
        raise UserError(f"the checkpoint was trained on {base}, this run has {own}; choose the same base model.")
    if task._trainer is not None and task.trainer.state.fn == "fit":
        _check_rates(checkpoint.get("rates", {}), _rates(task))
    checkpoint["state_dict"] |= checkpoint.get("derived") or {}
    procedure.restore(task, checkpoint)


def _check_steps(task: Any, done: int) -> None:
    """Refuse a checkpoint behind the end of the planned run."""
    trainer = task._trainer
    planned = getattr(getattr(trainer, "datamodule", None), "plan", None) is not None
    if planned and trainer.state.fn == "fit" and done > task.total_steps():
        raise UserError(
            f"{done:,} steps are done; this run has only {task.total_steps():,}. "
            "Set a larger --data.steps (or --data.epochs), or start a new run."
        )


def _check_rates(there: Mapping[str, float], here: Mapping[str, float]) -> None:
    """Refuse a checkpoint of other factors of the learning rate, with both values of the first that differs."""
    for name in [*here, *there]:
        before, now = there.get(name, 1.0), here.get(name, 1.0)
        if before != now:
            raise UserError(
                f"{name} trains at {before:g} times the learning rate in the checkpoint and at {now:g} times in this "
                "run; give the adapter the rates of the checkpoint, or start a new run."
            )


def check_state(task: Any, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state that does not fit (see `check_tensors`), and reset the base model's statistics for it."""
    kept = _own(task, update_buffers(task.model)).keys() - _own(task, derived_buffers(task.model)).keys()
    needed = _trained(task).keys() | kept
    check_tensors(state_dict, task.state_dict(), needed, "the checkpoint")
    reset_buffers(task.model)
