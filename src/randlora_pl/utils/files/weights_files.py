"""Weights files of base models: adapters say their name and hash, and this finds them on the machine at hand.

Where a file lies is nobody else's business and is wrong on the next machine, so no adapter says it. The cache knows
where each file lay when it was last read, by its hash.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.cache_folder import cache_folder, write_whole

WEIGHTS_VARIABLE = "RANDLORA_PL_WEIGHTS"
"""Environment variable: weights files, or folders of them, as in PATH; what ``--pretrained`` sets."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy")


def looks_like_file(value: str) -> bool:
    """Whether ``value`` means a path and not a tag: it exists, has a folder in it, or a weights suffix."""
    return "/" in value or "\\" in value or value.lower().endswith(_SUFFIXES) or Path(value).is_file()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; calculated once for a file that is not written again."""
    file = Path(path).expanduser().absolute()
    return _sha256(file, file.stat().st_mtime_ns, file.stat().st_size)


@lru_cache(maxsize=256)
def _sha256(file: Path, time: int, size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remember(path: str | Path) -> str:
    """Notes in the cache where a weights file lies.

    Returns:
        Its SHA-256.
    """
    file = Path(path).expanduser().absolute()
    digest = file_sha256(file)
    _here[digest] = file
    try:
        if not _note(digest).is_file() or _noted(digest) != file:
            write_whole(_note(digest), lambda stream: stream.write(os.fsencode(file)))
    except OSError:  # a cache that cannot be written costs an option later
        pass
    return digest


_here: dict[str, Path] = {}


def _note(digest: str) -> Path:
    return cache_folder() / "weights_files" / digest


def _noted(digest: str) -> Path | None:
    try:
        return Path(os.fsdecode(_note(digest).read_bytes()))
    except (OSError, ValueError):  # a hash with a null byte in it
        return _here.get(digest)


def register_weights(files: list[Path]) -> None:
    """Has `find_weights` look at these files, or in these folders, in this process and those that it starts.

    Raises:
        UserError: One does not exist.
    """
    for file in files:
        if not file.exists():
            raise UserError(f"--pretrained: {file} does not exist; give the weights file of the base model.")
    os.environ[WEIGHTS_VARIABLE] = os.pathsep.join(str(file.absolute()) for file in files)


def find_weights(base: Mapping[str, Any], source: object) -> str | None:
    """The weights file of a base model on this machine.

    Args:
        base: ``base_model`` of an adapter's description.
        source: The adapter, for the message.

    Returns:
        Its path; None where the base model has no file and none was given, so that name and tag say enough. A file
        that was given need not have the hash: whether the weights fit is checked once they are read.

    Raises:
        UserError: There is none here; says which one and how to give it.
    """
    given = [Path(word).expanduser() for word in os.environ.get(WEIGHTS_VARIABLE, "").split(os.pathsep) if word]
    name, digest = str(base.get("pretrained")), base.get("sha256")
    if not digest:
        alone = len(given) == 1 and given[0].is_file() and name != "random"
        return str(given[0]) if alone else None
    plain = file_name(name)
    files = [file for file in (place / plain if place.is_dir() else place for place in given) if file.is_file()]
    here = [file for file in (*files, _noted(str(digest)), Path(name).expanduser()) if file and file.is_file()]
    for file in here:
        if file_sha256(file) == digest:
            return str(file)
    if files:
        return str(files[0])
    unknown = f"are others in {here[0]} now" if here else "is not known on this machine"
    raise UserError(
        f"{source}: the weights of its base model {base.get('name')} are the file {plain} (SHA-256 "
        f"{str(digest)[:12]}...), which {unknown}: give it by --pretrained FILE, or {WEIGHTS_VARIABLE}=FILE."
    )


def file_name(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[/\\]", path)[-1]


def without_local_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's description with the weights file of its base model by name only, for others to read."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    base, metadata = copy.get("base_model"), copy.get("metadata")
    known = isinstance(base, dict) and bool(base.get("sha256"))
    for holder in (base, metadata.get("arguments") if isinstance(metadata, dict) else None):
        given = holder.get("pretrained") if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(given, str) and (known or looks_like_file(given)):
            holder["pretrained"] = file_name(given)
    return copy
