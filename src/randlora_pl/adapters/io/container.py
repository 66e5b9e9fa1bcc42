"""An adapter on the disk: a folder of files, or one ``.safetensors`` file that carries its description.

A folder holds `adapter.safetensors`, `adapter_config.json` and, for bases that no seed gives,
`bases.safetensors`. It is written whole under a temporary name and takes the place of an older one by two
renames: a run that is killed leaves the old one or the new one, and in the instant between the renames both
under hidden names beside it. One file holds the same, the description as metadata and the bases behind a
prefix. Nothing here unpickles.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.cache_folder import umask
from randlora_pl.utils.files.documents import parse_json

TENSORS, CONFIG, BASES = "adapter.safetensors", "adapter_config.json", "bases.safetensors"
SUFFIX = ".safetensors"
_KEY, _PREFIX = "adapter_config", "bases."


@dataclass(frozen=True)
class Contents:
    """What an adapter consists of.

    Attributes:
        config: The description, JSON values.
        tensors: Trained tensors by name.
        bases: Random tensors that no seed gives, usually none.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    bases: dict[str, Tensor] = field(default_factory=dict)


def write(path: Path, contents: Contents) -> None:
    """Writes an adapter with its checksums; replaces an older one at once.

    Args:
        path: A folder, or a file whose name ends in ``.safetensors``; parents are made.
        contents: What to write.

    Raises:
        UserError: The path holds anything but an older adapter.
        OSError: It cannot be written, for example because the disk is full; the older adapter stays.
    """
    config = {**contents.config, "sha256": checksums(contents)}
    text = json.dumps(config, indent=2) + "\n"
    if path.suffix == SUFFIX:
        if path.exists() and _config_of_file(path) is None:
            raise UserError(f"{path} is no adapter; name a new file, nothing was written.")
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = contents.tensors | {_PREFIX + name: tensor for name, tensor in contents.bases.items()}
        part = path.with_name(f".{path.name}.part-{os.getpid()}")
        with _removed_on_failure(part, path):
            save_tensors(tensors, part, {_KEY: text})
            part.replace(path)
        return
    if path.exists() and (not path.is_dir() or {e.name for e in path.iterdir()} - {TENSORS, CONFIG, BASES}):
        raise UserError(f"{path} holds other things than an adapter; name a new folder, nothing was written.")
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with _removed_on_failure(part, path):
        (part / CONFIG).write_text(text)
        _synced(part / CONFIG)
        save_tensors(contents.tensors, part / TENSORS)
        if contents.bases:
            save_tensors(contents.bases, part / BASES)
    if path.exists():
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
        part.rename(path)
        shutil.rmtree(old)
    else:
        part.rename(path)


def read(path: Path, name: Path | None = None) -> Contents:
    """Reads an adapter without checking more than that its files can be read.

    Args:
        path: A folder or a file.
        name: What messages call it; the path by default.

    Raises:
        UserError: It is no adapter, or cannot be read.
    """
    name = path if name is None else name
    if path.is_file():
        config = _config_of_file(path)
        if config is None:
            raise UserError(f"{name} is no adapter file: its metadata has no description. {_where(path)}")
        together = load_tensors(path)
        bases = {n.removeprefix(_PREFIX): value for n, value in together.items() if n.startswith(_PREFIX)}
        return Contents(_parsed(config, name), {n: v for n, v in together.items() if not n.startswith(_PREFIX)}, bases)
    if not (path / CONFIG).is_file() or not (path / TENSORS).is_file():
        raise UserError(f"{name} is no adapter folder: it needs {CONFIG} and {TENSORS}. {_where(path)}")
    config = (path / CONFIG).read_bytes()
    bases = load_tensors(path / BASES, name / BASES) if (path / BASES).is_file() else {}
    return Contents(_parsed(config, name / CONFIG), load_tensors(path / TENSORS, name / TENSORS), bases)


def changed(contents: Contents) -> list[str]:
    """What was changed since an adapter was saved: names of tensors, or of the description; usually nothing."""
    saved = contents.config.get("sha256")
    if saved is None:  # taken out on purpose, by someone who edited the description
        return []
    try:
        there, here = dict(saved), checksums(contents)
        return [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    except (TypeError, ValueError):
        return ["sha256"]


def checksums(contents: Contents) -> dict[str, str]:
    """SHA-256 of the description and of each tensor with its dtype and shape; safetensors has none of its own."""
    plain = {name: value for name, value in contents.config.items() if name != "sha256"}
    text = json.dumps(json.loads(json.dumps(plain)), sort_keys=True)
    sums = {CONFIG: hashlib.sha256(text.encode()).hexdigest()}
    every = contents.tensors | {_PREFIX + name: tensor for name, tensor in contents.bases.items()}
    for name, tensor in sorted(every.items()):
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        sums[name] = digest.hexdigest()
    return sums


def _where(path: Path) -> str:
    inside = [name for name in ("adapter", "adapter-best") if (path / name).is_dir()]
    return f"Did you mean {path / inside[0]}?" if inside else "A run keeps it in RUN/adapter."


def _config_of_file(path: Path) -> bytes | None:
    """The description in a file's metadata; None where there is none."""
    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): truncated, damaged or no safetensors file.") from None
    return None if text is None else text.encode()


def _parsed(text: bytes, source: Path) -> dict[str, Any]:
    try:
        config = parse_json(text)
    except ValueError as error:
        raise UserError(f"{source} cannot be read ({type(error).__name__}: {error}); save it again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{source} cannot be read (it is no JSON object); save it again.")
    return config


def _check_readable(file: Path) -> None:
    """Have the system say why a file cannot be opened: safetensors calls it absent, whatever the reason.

    Raises:
        OSError: With the reason.
    """
    with file.open("rb"):
        pass


def load_tensors(file: Path, name: Path | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; messages call it by its path, or by a name.

    Raises:
        UserError: It is truncated or damaged.
        OSError: It cannot be opened.
    """
    _check_readable(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name or file} cannot be read ({error}): truncated or damaged; copy it again.") from None


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file that whoever may read the user's files may read, and waits until it is on the disk.

    Raises:
        OSError: It cannot be written, for example because the disk is full.
    """
    try:
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(plain, file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # hides the system's error
        if system := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(file)) from error
        raise
    file.chmod(0o666 & ~umask())  # safetensors makes files that only their owner may read
    _synced(file)


def _synced(file: Path) -> None:
    """A power cut must not find a file renamed and empty."""
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _removed_on_failure(part: Path, final: Path) -> Iterator[None]:
    """Removes a part that was not finished, and gives errors of the system the final name."""
    try:
        yield
    except BaseException as error:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(final)
        raise
