"""A PEFT adapter on the disk: `adapter_config.json` and `adapter_model.safetensors`. Nothing here unpickles."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from randlora_pl.adapters.io.container import load_tensors, save_tensors
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import move, part_folder
from randlora_pl.utils.files.documents import parse_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TASK, HEAD = "task.json", "head.safetensors"
"""Ours, beside PEFT's: what a prediction needs besides the adapter. PEFT passes them over."""

PREFIX = "base_model.model."
"""What precedes the names of the base model in a PEFT file."""

_FILES = {CONFIG, TENSORS, TASK, HEAD, "README.md"}


@dataclass(frozen=True)
class PeftAdapter:
    """What a PEFT adapter consists of.

    Attributes:
        config: `adapter_config.json`.
        tensors: By name, without the prefix of the base model; shared bases as ``randlora_A`` and so on.
        head: A head that is not part of PEFT's file, kept beside it.
        task: The task that it was trained in, with its arguments, class names and prompts, kept beside it.
        path: Where it was read.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()


def read(path: str | os.PathLike[str]) -> PeftAdapter:
    """Reads a PEFT adapter.

    Raises:
        UserError: It is none, it is a pickle, or it cannot be read.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is no PEFT adapter: it has no {CONFIG}. Give the folder that save_pretrained wrote.")
    if not (path / TENSORS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise UserError(
                f"{path} has its tensors as a pickle (adapter_model.bin), which can run code when it is opened. "
                "Load it with PEFT where you trust it, and write it again: model.save_pretrained(DIR)"
            )
        ours = " It is an adapter of this program." if (path / "adapter.safetensors").is_file() else ""
        raise UserError(f"{path} is no PEFT adapter: it has no {TENSORS}.{ours}")
    config = _json(path / CONFIG)
    if "peft_type" not in config:
        raise UserError(f"{path / CONFIG} names no peft_type, so the method is unknown; copy it again.")
    inner = {
        name.removeprefix(PREFIX).removeprefix("base_model."): tensor
        for name, tensor in load_tensors(path / TENSORS).items()
    }
    head = load_tensors(path / HEAD) if (path / HEAD).is_file() else {}
    task = _json(path / TASK) if (path / TASK).is_file() else {}
    return PeftAdapter(config, inner, head, task, path)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error}); copy it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is no JSON object; copy it again.")
    return value


@contextmanager
def written(adapter: PeftAdapter, path: Path) -> Iterator[Path]:
    """Writes an adapter under a temporary name, which it loses at the end of the block unless that fails.

    Yields:
        The folder under its temporary name, for a check.

    Raises:
        UserError: The path holds other things than a PEFT adapter, or cannot be written.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - _FILES):
        raise UserError(f"{path} holds other things than a PEFT adapter; name a new folder, nothing was written.")
    with part_folder(path) as temporary:
        part = temporary / path.name
        part.mkdir()
        (part / CONFIG).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
        _save({_prefixed(name): tensor for name, tensor in adapter.tensors.items()}, part / TENSORS)
        if adapter.head:
            _save(adapter.head, part / HEAD)
        if adapter.task:
            (part / TASK).write_text(json.dumps(adapter.task, indent=2) + "\n")
        yield part
        move(part, path)


def _prefixed(name: str) -> str:
    """Shared bases belong to PEFT's own model, everything else to a module of the base model."""
    return PREFIX + name if "." in name else f"base_model.{name}"


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_tensors({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, file)
