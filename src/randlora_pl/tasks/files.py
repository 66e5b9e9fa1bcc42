"""Names of tasks in files, and checks of tensors."""

import hashlib
import json
from collections.abc import Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.own_classes import parent_among, path_of

Adopted = Literal["linear head", "image tower", "both towers", "decoder"]
"""Part of a model that an adapter of another program has trained."""


def check_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: Collection[str], what: str) -> None:
    """Refuse given tensors if a needed one is missing, or one is unknown or has another shape than the own one."""
    missing, unknown = sorted(set(needed) - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        raise UserError(f"{what} does not fit: missing {missing[:3]}, unexpected {unknown[:3]}.")
    for name, value in given.items():
        if value.shape != own[name].shape:
            there, here = tuple(value.shape), tuple(own[name].shape)
            raise UserError(f"{what} does not fit: {name} has shape {there} there and {here} here.")


def check_options(options: Mapping[str, Any], kind: str) -> None:
    """Refuse options of a task that a file cannot hold."""
    try:
        json.dumps(options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind}: options that cannot be saved ({error}). Use numbers, texts and lists.") from None


def checksum(tensors: Mapping[str, Tensor], start: str = "") -> str:
    """Return a checksum of a text, and of tensors with their names and shapes."""
    digest = hashlib.sha256(start.encode())
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def rooms() -> list[ModuleType]:
    """Return the packages that export tasks."""
    return [import_module(f"randlora_pl.{name}") for name in ("tasks", "language")]


def task_names() -> frozenset[str]:
    """Return the names of the classes of this program that a task can have."""
    bases = {"AdaptationModule", "HeadTask", "ImageTask", "Objective"}
    return frozenset(name for room in rooms() for name in room.__all__) - bases


def kind_of(kind: type) -> str:
    """Return the name of a task's class; from outside, the name of its nearest parent here, or its import path."""
    return parent_among(kind, task_names()) or path_of(kind)
