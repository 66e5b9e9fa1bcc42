"""Weights files of base models: on this machine, by the name and hash that adapters store, and of the Hugging Face Hub.

Adapters do not store local paths, which are private and not portable. The cache stores the last known path of each
file by its hash.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from randlora_pl.utils.errors import UserError, first_line
from randlora_pl.utils.files import write_bytes
from randlora_pl.utils.machine import cache_folder

WEIGHTS_VARIABLE = "RANDLORA_PL_WEIGHTS"
"""Environment variable with weights files or folders, separated as in PATH; ``--pretrained`` sets it."""

LOCAL = "local-dir:"
"""Start of a base model's name that is a folder."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy")


def looks_like_file(value: str) -> bool:
    """Return True if a value is a path and not a tag: it exists, contains a folder, or has a weights suffix."""
    return "/" in value or "\\" in value or value.lower().endswith(_SUFFIXES) or Path(value).is_file()


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, cached until the file changes."""
    file = Path(path).expanduser().absolute()
    return _sha256(file, file.stat().st_mtime_ns, file.stat().st_size)


@lru_cache(maxsize=256)
def _sha256(file: Path, time: int, size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remember(path: str | Path) -> str:
    """Store the path of a weights file in the cache, and return the file's SHA-256."""
    file, digest = Path(path).expanduser().absolute(), file_sha256(path)
    _here[digest] = file
    with suppress(OSError):  # without a cache, another process has to be given --pretrained
        if _stored_path(digest) != file:
            write_bytes(cache_folder() / "weights_files" / digest, os.fsencode(file))
    return digest


_here: dict[str, Path] = {}
"""Files that this process was given, by SHA-256."""


def _stored_path(digest: str) -> Path | None:
    if re.fullmatch("[0-9a-f]{64}", digest) is None:  # from a stranger's file, for example "/dev/zero"
        return None
    with suppress(OSError):
        return Path(os.fsdecode((cache_folder() / "weights_files" / digest).read_bytes()))
    return None


def register_weights(files: Sequence[Path]) -> None:
    """Let `find_weights` search these files or folders, in this process and its child processes.

    Raises:
        UserError: A file does not exist.
    """
    for file in files:
        if not file.exists():
            raise UserError(f"--pretrained: {file} does not exist. Pass the weights file of the base model.")
    os.environ[WEIGHTS_VARIABLE] = os.pathsep.join(str(file.absolute()) for file in files)


def registered() -> list[Path]:
    """Return the files and folders of weights that the user named in ``RANDLORA_PL_WEIGHTS``."""
    return [Path(word).expanduser() for word in os.environ.get(WEIGHTS_VARIABLE, "").split(os.pathsep) if word]


def find_weights(base: Mapping[str, Any], source: object) -> str | None:
    """Return the path of a base model's weights file on this machine.

    It is None if the base model is defined by name and tag, or by a repository of the Hub, and the user gave no file.
    A file that the user gave may have another hash: the weights themselves are compared after they are loaded.

    Raises:
        UserError: The file is not on this machine; the message has it and the option.
    """
    given = registered()
    name, digest = str(base.get("pretrained")), base.get("sha256")
    if not digest:
        alone = len(given) == 1 and given[0].is_file() and name != "random"
        return str(given[0]) if alone else None
    plain = file_name(name)
    files = [file for file in (path / plain if path.is_dir() else path for path in given) if file.is_file()]
    known = _stored_path(str(digest)) or _here.get(str(digest))
    here = [file for file in (*files, known, Path(name).expanduser()) if file and file.is_file()]
    for file in here:
        if file_sha256(file) == digest:
            return str(file)
    if files:
        return str(files[0])
    if str(base.get("name")).startswith("hf-hub:"):
        return None
    unknown = f"has other content in {here[0]} now" if here else "is not known on this machine"
    raise UserError(
        f"{source}: the weights of its base model {base.get('name')} are the file {plain} (SHA-256 "
        f"{str(digest)[:12]}...), which {unknown}. Pass --pretrained FILE, or set {WEIGHTS_VARIABLE}=FILE."
    )


def base_arguments(base: Mapping[str, Any], source: object) -> dict[str, str]:
    """Return the arguments ``name`` and ``pretrained`` of a base model that differ on this machine from a file's.

    Raises:
        UserError: The weights, or the folder of the model, are not on this machine.
    """
    arguments, name, digest = {}, str(base.get("name")), str(base.get("config_sha256"))
    if weights := find_weights(base, source):
        arguments["pretrained"] = weights
    elif base.get("sha256"):
        arguments["pretrained"] = "own"  # of a repository of the Hub
    if not name.startswith(LOCAL):
        return arguments
    folders = [path if path.is_dir() else path.parent for path in registered()]
    noted = _stored_path(digest) or _here.get(digest)
    files = [file for folder in folders for file in folder.glob("*config.json")] + ([noted] if noted else [])
    for file in files:
        if file.is_file() and file_sha256(file) == digest:
            return arguments | {"name": LOCAL + str(file.parent)}
    raise UserError(
        f"{source}: the folder {name.removeprefix(LOCAL)} of its base model (configuration {digest[:12]}...) is not "
        f"known on this machine. Pass --pretrained FOLDER, or set {WEIGHTS_VARIABLE}=FOLDER."
    )


def local_name(base: Mapping[str, Any], source: object) -> str:
    """Return the name by which this machine builds a base model; arguments and errors as of `base_arguments`."""
    return base_arguments(base, source).get("name", str(base["name"]))


def base_words(base: Mapping[str, Any]) -> str:
    """Return library, name and tag of a base model, as far as they are known."""
    return " ".join(str(base[key]) for key in ("library", "name", "pretrained") if base.get(key))


def file_name(path: str) -> str:
    """Return the last part of a POSIX or Windows path."""
    return re.split(r"[/\\]", path)[-1]


def without_local_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``adapter_config.json`` without local paths: the weights file is reduced to its name."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    base, metadata = copy.get("base_model"), copy.get("metadata")
    known = isinstance(base, dict) and bool(base.get("sha256"))
    for holder in (base, metadata.get("arguments") if isinstance(metadata, dict) else None):
        given = holder.get("pretrained") if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(given, str) and (known or looks_like_file(given)):
            holder["pretrained"] = file_name(given)
    return copy


@contextmanager
def asking_hub() -> Iterator[None]:
    """Ask the Hugging Face Hub once: without a network, everything inside fails at once and without a log line.

    huggingface_hub would try six times for each file, with two messages per try. A server that answers, but with an
    error, is asked again, with one message. The filter is on the logger that emits the messages, because filters of
    parent loggers do not apply to them.
    """
    from huggingface_hub import constants

    offline, reported = constants.HF_HUB_OFFLINE, False

    def hold(record: logging.LogRecord) -> bool:
        nonlocal reported
        message, error = record.getMessage(), sys.exc_info()[1]
        if "thrown while requesting" in message and error is not None:  # a server that cannot be reached
            constants.HF_HUB_OFFLINE = True
            raise error
        if not message.startswith(("HTTP Error", "Retrying in ", "Rate limited")):
            return True
        if not reported:
            reported = True
            logging.getLogger("randlora_pl").warning("The Hugging Face Hub is busy; trying again.")
        return False

    library = logging.getLogger("huggingface_hub.utils._http")
    library.addFilter(hold)
    try:
        yield
    finally:
        library.removeFilter(hold)
        constants.HF_HUB_OFFLINE = offline


@contextmanager
def no_code_of_others() -> Iterator[None]:
    """Let transformers refuse a repository that needs code of its own, instead of asking in the terminal to run it."""
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def hub_file(repository: str, name: str, revision: str | None, option: str) -> Path | None:
    """Return a file of a repository, from the cache or downloaded; None if the repository does not have it.

    Args:
        repository: ``ORG/NAME``.
        name: Name of the file.
        revision: Branch, tag or commit; None for the default branch.
        option: Option with the repository, for messages.

    Raises:
        UserError: The repository is unknown, private, gated or cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"https://huggingface.co/{repository}"
    copy = "download the repository and pass local-dir:FOLDER."
    messages: dict[type[Exception], str] = {
        LocalEntryNotFoundError: f"{name} of {repository} is not in the cache, and the Hugging Face Hub cannot be "
        f"reached. Run once with a network, or {copy}",
        GatedRepoError: f"{repository} is gated: accept its license at {where}, then log in with `hf auth login` or "
        "set HF_TOKEN.",
        RepositoryNotFoundError: f"the Hugging Face Hub has no model {repository}, or it is private. Check the name "
        f"at {where}, or log in with `hf auth login`.",
        RevisionNotFoundError: f"{repository} has no revision {revision!r}. See {where}/tree/main.",
        HFValidationError: f"{repository!r} is not a repository of the Hub. Use hf-hub:ORG/NAME.",
    }
    try:
        with asking_hub():
            return Path(hf_hub_download(repository, name, revision=revision))
    except Exception as error:  # the HTTP client, the disk and Xet raise different types
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        failed = f"{name} of {repository} cannot be downloaded ({first_line(error)}). Run the command again, or {copy}"
        what = next((text for kind, text in messages.items() if isinstance(error, kind)), failed)
        raise UserError(f"{option}: {what}") from error
