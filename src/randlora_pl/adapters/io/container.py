"""Adapter on disk: a folder, or one ``.safetensors`` file with its config as metadata.

A folder contains `adapter.safetensors`, `adapter_config.json` and, for bases that no seed generates,
`bases.safetensors`. A single file has the config in its metadata and the bases under a prefix. Both are written
atomically. No pickle is loaded.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import atomic_folder, move, parse_json, scratch_folder, umask

TENSORS, CONFIG, BASES = "adapter.safetensors", "adapter_config.json", "bases.safetensors"
SUFFIX = ".safetensors"
_KEY, _PREFIX = "adapter_config", "bases."


@dataclass(frozen=True)
class Contents:
    """Content of an adapter on disk.

    Attributes:
        config: Config as JSON values.
        tensors: Trained tensors by name.
        bases: Random tensors that no seed generates; usually empty.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    bases: dict[str, Tensor] = field(default_factory=dict)


def write(path: Path, contents: Contents) -> None:
    """Write an adapter with its checksums, and replace an older one atomically.

    Args:
        path: Folder, or file whose name ends in ``.safetensors``; parent folders are created.
        contents: Content to write.

    Raises:
        UserError: The path contains anything other than an adapter.
        OSError: The adapter cannot be written, for example because the disk is full; the older adapter stays.
    """
    config = {**contents.config, "sha256": checksums(contents)}
    text = json.dumps(config, indent=2) + "\n"
    if path.suffix == SUFFIX:
        if path.exists() and _config_of_file(path) is None:
            raise UserError(f"{path} is not an adapter, so nothing was written. Set a new file.")
        tensors = contents.tensors | {_PREFIX + name: tensor for name, tensor in contents.bases.items()}
        with scratch_folder(path) as part:
            save_tensors(tensors, part / path.name, {_KEY: text})
            move(part / path.name, path)
        return
    if path.exists() and (not path.is_dir() or {e.name for e in path.iterdir()} - {TENSORS, CONFIG, BASES}):
        raise UserError(f"{path} contains other files than an adapter, so nothing was written. Set a new folder.")
    with atomic_folder(path) as part:
        (part / CONFIG).write_text(text)
        save_tensors(contents.tensors, part / TENSORS)
        if contents.bases:
            save_tensors(contents.bases, part / BASES)


def read(path: Path, name: Path | None = None) -> Contents:
    """Read an adapter; only check that its files are readable.

    Args:
        path: Folder or file.
        name: Name in messages; by default the path.

    Raises:
        UserError: The path is not an adapter, or cannot be read.
    """
    name = path if name is None else name
    if path.is_file():
        source, kind, text = name, f"file: its metadata has no {_KEY}", _config_of_file(path)
    else:
        source, kind = name / CONFIG, f"folder: it needs {CONFIG} and {TENSORS}"
        text = (path / CONFIG).read_bytes() if (path / CONFIG).is_file() and (path / TENSORS).is_file() else None
    if text is None:
        inside = [each for each in ("adapter", "adapter-best") if (path / each).is_dir()]
        hint = f"Did you mean {path / inside[0]}?" if inside else "A run writes it to RUN/adapter."
        if (path / "adapter_model.safetensors").is_file():
            hint = (
                "PEFT wrote it: load it with import_peft(folder, model), or `randlora-pl adapter import --from peft`."
            )
        raise UserError(f"{name} is not an adapter {kind}. {hint}")
    try:
        config = parse_json(text)
    except ValueError as error:
        raise UserError(f"{source} cannot be read ({type(error).__name__}: {error}). Save it again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{source} cannot be read (not a JSON object). Save it again.")
    if path.is_file():
        tensors = load_tensors(path)
        bases = {key.removeprefix(_PREFIX): tensors.pop(key) for key in list(tensors) if key.startswith(_PREFIX)}
    else:
        tensors = load_tensors(path / TENSORS, name / TENSORS)
        bases = load_tensors(path / BASES, name / BASES) if (path / BASES).is_file() else {}
    return Contents(config, tensors, bases)


def changed(contents: Contents) -> list[str]:
    """Return the names of tensors, or of the config, that changed since an adapter was saved."""
    saved = contents.config.get("sha256")
    if saved is None:  # removed on purpose after an edit of the config
        return []
    try:
        there, here = dict(saved), checksums(contents)
        return [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    except (TypeError, ValueError):
        return ["sha256"]


def checksums(contents: Contents) -> dict[str, str]:
    """Return the SHA-256 of the config and of each tensor with its dtype and shape; safetensors stores none."""
    plain = {name: value for name, value in contents.config.items() if name != "sha256"}
    text = json.dumps(json.loads(json.dumps(plain)), sort_keys=True)
    sums = {CONFIG: hashlib.sha256(text.encode()).hexdigest()}
    every = contents.tensors | {_PREFIX + name: tensor for name, tensor in contents.bases.items()}
    for name, tensor in sorted(every.items()):
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        sums[name] = digest.hexdigest()
    return sums


def _config_of_file(path: Path) -> bytes | None:
    """Return the config in a file's metadata, or None."""
    with path.open("rb"):  # raises the system's error; safetensors reports every unreadable file as missing
        pass
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): truncated, damaged or not a safetensors file.") from None
    return None if text is None else text.encode()


def load_tensors(file: Path, name: Path | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU; messages use ``name`` instead of the path.

    Raises:
        UserError: The file is truncated or damaged.
        OSError: The file cannot be opened.
    """
    with file.open("rb"):  # raises the system's error
        pass
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name or file} cannot be read ({error}): truncated or damaged. Copy it again.") from None


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the umask, and sync it to disk.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    try:
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(plain, file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # contains the system's error as text
        if system := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(file)) from error
        raise
    file.chmod(0o666 & ~umask())  # safetensors gives access to the owner only
