"""Files of a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`. No pickle is loaded."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from torch import Tensor

from randlora_pl.adapters.save_load import load_tensors, save_tensors
from randlora_pl.utils.adapter_schema import BaseModel
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import atomic_folder, disk_errors, parse_json
from randlora_pl.utils.options import misfit

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TASK, HEAD = "task.json", "head.safetensors"
"""Our files beside PEFT's, with the further data for predictions; PEFT ignores them."""

PREFIX = "base_model.model."
"""Prefix of the base model's names in a PEFT file."""

_FILES = {CONFIG, TENSORS, TASK, HEAD, "README.md"}


class _Arguments(TypedDict, total=False):
    """Arguments of a task that are used before its class is known."""

    seed: int
    img_size: int | None


class _Task(TypedDict, total=False):
    """Content of `TASK`; further keys are allowed."""

    task: str
    arguments: _Arguments
    classnames: list[str]
    templates: list[str]
    base_model: BaseModel


@dataclass(frozen=True)
class PeftAdapter:
    """Contents of a PEFT adapter, read from ``path``.

    Names of tensors are without the base model's prefix, shared bases ``randlora_A`` and so on. The head outside PEFT's
    file, and the task with its arguments, class names and prompts, are stored beside it.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()


def read(path: str | os.PathLike[str], name: str | None = None) -> PeftAdapter:
    """Read a PEFT adapter from its folder; messages have ``name``, by default the path.

    Raises:
        UserError: The folder is not a PEFT adapter, has a pickle, or cannot be read.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path} is not a PEFT adapter: it has no {CONFIG}. Pass the folder written by save_pretrained."
        )
    if not (path / TENSORS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise UserError(
                f"{path} has its tensors as a pickle (adapter_model.bin), which can run code when it is opened. "
                "If you trust it, load it with PEFT and save it again: model.save_pretrained(DIR)"
            )
        ours = (
            " It is an adapter of this program: use load_adapter." if (path / "adapter.safetensors").is_file() else ""
        )
        raise UserError(f"{path} is not a PEFT adapter: it has no {TENSORS}.{ours}")
    config = _json(path / CONFIG)
    if "peft_type" not in config:
        raise UserError(f"{path / CONFIG} has no peft_type, so the method is unknown; copy it again.")
    stored = load_tensors(path / TENSORS).items()
    inner = {name.removeprefix(PREFIX).removeprefix("base_model."): tensor for name, tensor in stored}
    head = load_tensors(path / HEAD) if (path / HEAD).is_file() else {}
    task = _json(path / TASK) if (path / TASK).is_file() else {}
    if wrong := misfit(task, _Task):
        raise UserError(f"{path / TASK}: {wrong}; copy it again.")
    return PeftAdapter(config, inner, head, task, Path(name or path))


def _json(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error}); copy it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object; copy it again.")
    return value


@contextmanager
def written(adapter: PeftAdapter, path: Path) -> Iterator[Path]:
    """Write an adapter under a temporary name and rename it if the block succeeds.

    Yields:
        Temporary folder, for verification.

    Raises:
        UserError: The path has other files than a PEFT adapter's, or cannot be written.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - _FILES):
        raise UserError(f"{path} has other files than a PEFT adapter's; nothing was written. Set a new folder.")
    with disk_errors(path), atomic_folder(path) as part:
        (part / CONFIG).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
        # shared bases belong to PEFT's model, all else to a module of the base model
        _save(
            {f"{PREFIX if '.' in name else 'base_model.'}{name}": t for name, t in adapter.tensors.items()},
            part / TENSORS,
        )
        if adapter.head:
            _save(adapter.head, part / HEAD)
        if adapter.task:
            (part / TASK).write_text(json.dumps(adapter.task, indent=2) + "\n")
        yield part


def base_name(base: Mapping[str, Any]) -> str | None:
    """Return the base model's id on the Hugging Face Hub, or None."""
    name, tag = base.get("name"), base.get("pretrained")
    if not name or tag == "random":
        return None
    if base.get("library") == "transformers":
        return str(name) if tag == name else None
    if base.get("library") == "timm":
        return f"timm/{name}" if "." in str(name) else None
    return None if base.get("sha256") else f"{name}/{tag}"


def named_base(adapter: PeftAdapter) -> tuple[str, str | None] | None:
    """Return name and weights of the base model that an adapter names; None if no library here is known to have it.

    Local paths are not taken: the adapter may come from a stranger.
    """
    own = adapter.task.get("base_model")
    if isinstance(own, dict):
        name, tag = own.get("name"), own.get("pretrained")
        if not _is_id(name) or not _is_id(tag) or own.get("sha256"):
            return None
        return name, None if tag == name else tag
    whole = adapter.config.get("base_model_name_or_path")
    if not _is_id(whole):
        return None
    if adapter.config.get("task_type") == "CAUSAL_LM":
        return whole, None
    owner, _, name = whole.rpartition("/")
    if owner == "timm":
        return name, "timm"
    import open_clip

    return (owner, name) if owner in open_clip.list_models() else None


def _is_id(value: object) -> TypeGuard[str]:
    """Return True for a name or id of a model that is not also a path here, nor one such as ``local-dir:PATH``."""
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", value, re.ASCII):
        return False
    return not Path(value).exists()


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_tensors({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, file)
