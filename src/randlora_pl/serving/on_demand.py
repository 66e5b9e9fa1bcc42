"""Adapters of a folder: their names, their files as they are now, and those in memory, loaded on demand under a bound.

An adapter is loaded from a private copy of its files, whose checksums are verified. So what happens to the files
meanwhile or later changes no weights that are in use.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastapi import HTTPException
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.adapters.save_load import BASES, CONFIG, SUFFIX, TENSORS
from randlora_pl.language.catalog import TASKS
from randlora_pl.tasks import ImageTask
from randlora_pl.tasks.losses import check_numbers
from randlora_pl.tasks.restore import backbone_of, plain_task, require_classes
from randlora_pl.tasks.task_set import TaskSet
from randlora_pl.utils.errors import UserError, brief, log, out_of_memory, shorten
from randlora_pl.utils.weights_files import base_words

MOST_DESCRIBED = 4_000_000
"""Maximum size of a config in bytes, or of a header of safetensors: a header of 59 MB takes minutes."""
MOST_TEXTS = 100_000
"""Maximum number of texts of an adapter, classes x prompts. Encoding them makes other requests wait."""


class Files(NamedTuple):
    """Folder or file of an adapter, its files, and size, inode and times of each, which any write changes."""

    path: Path
    files: tuple[Path, ...]
    states: tuple[tuple[int, ...], ...]


def is_name(name: str) -> bool:
    """Return True if a text can be the name of an adapter in a folder: not hidden, and not a path."""
    return 0 < len(name) <= 255 and name.isprintable() and name[0] != "." and not set(name) & set("/\\:")


def find_files(folder: Path, name: str) -> Files | None:
    """Return the files of an adapter, ``NAME`` or ``NAME.safetensors`` in a folder; None if there is none.

    Links are not followed, and only plain files count: nothing outside the folder is read.
    """
    path = folder / name
    try:
        if not is_name(name):
            return None
        files = [path / CONFIG, path / TENSORS, *([path / BASES] if os.path.lexists(path / BASES) else [])]
        if path.is_symlink() or not path.is_dir():
            files = [path := folder / f"{name}{SUFFIX}"]
        found = [file.lstat() for file in files]
    except OSError:
        return None
    if not all(stat.S_ISREG(each.st_mode) for each in found):
        return None
    states = ((each.st_size, each.st_ino, each.st_mtime_ns, each.st_ctime_ns) for each in found)
    return Files(path, tuple(files), tuple(states))


def list_names(folder: Path, most: int | None = None) -> list[str]:
    """Return the sorted names of the adapters in a folder, or the first of them; some may be damaged."""
    try:
        names = sorted({entry.name.removesuffix(SUFFIX) for entry in folder.iterdir()})
    except OSError:  # the folder is gone
        return []
    return list(islice((name for name in names if find_files(folder, name) is not None), most))


def check_classes(config: Mapping[str, Any], source: object) -> None:
    """Refuse an adapter of texts, or without class names."""
    metadata = config.get("metadata", {})
    if metadata.get("task") in TASKS:
        raise UserError(f"serve classifies images, not texts like {source}. Use: predict --adapter PATH --texts FILE")
    require_classes(metadata, source, "serve")


class Shelf:
    """Adapters of a folder in memory: ``limit`` bytes of tensors at most, of which those that several share count once.

    They are loaded into ``tasks``, whose first task has the base model, and the least recently used are unloaded.
    """

    def __init__(self, folder: Path, tasks: TaskSet, limit: int) -> None:
        self.folder, self.tasks, self.limit = folder, tasks, limit
        with tasks.adapters.using(None) as model:
            self._base = _storages(model)
        self._loaded: dict[str, tuple[Files, dict[int, int]]] = {}  # least recently used first
        self._refused: dict[str, tuple[Files, HTTPException]] = {}

    @property
    def held(self) -> int:
        """Bytes of the loaded adapters."""
        return sum({place: size for _, own in self._loaded.values() for place, size in own.items()}.values())

    def take(self, name: str, kept: Collection[str] = ()) -> ImageTask:
        """Return the task of an adapter, loaded if its files are new; those ``kept`` are not unloaded for it.

        Raises:
            HTTPException: The adapter is missing, damaged or too large, or does not fit the model.
        """
        files = find_files(self.folder, name)
        if name in self._loaded and self._loaded[name][0] != files:
            self._drop(name)
        if files is None:
            raise HTTPException(404, f"the server has no adapter {brief(name, 60)}; GET /health lists them")
        if name in self._loaded:
            self._loaded[name] = self._loaded.pop(name)
        elif name in self._refused and self._refused[name][0] == files:
            raise self._refused[name][1].with_traceback(None)
        else:
            try:
                self._load(name, files, kept)
            except Exception as error:  # nothing in the files of a stranger may end the worker
                refusal = _refusal(name, error)
                if refusal.status_code == 422:
                    self._refused[name] = files, refusal
                raise refusal from None
        return self.tasks.tasks[name]

    def shrink(self, kept: Collection[str] = (), room: int = 0) -> bool:
        """Unload adapters until the bound leaves ``room`` bytes free; return False if those ``kept`` leave less."""
        idle = [name for name in self._loaded if name not in kept]
        while self.held + room > self.limit and idle:
            self._drop(idle.pop(0))
        return self.held + room <= self.limit

    def _drop(self, name: str) -> None:
        self._loaded.pop(name, None)
        self.tasks.remove(name)

    def _load(self, name: str, files: Files, kept: Collection[str]) -> None:
        size, first = sum(size for size, *_ in files.states), self.tasks.first
        self._check_size(name, size, "at least ")
        with tempfile.TemporaryDirectory(prefix="randlora-pl-", ignore_cleanup_errors=True) as private:
            copy = _copied(files, Path(private))
            if find_files(self.folder, name) != files:
                raise HTTPException(503, f"the adapter {name} is being changed; send the request again")
            for each in files.files:
                _check_described(Path(private, each.name), name)
            file = replace(read_adapter(copy, name), path=Path(name))
            self._check_file(file)
            task = plain_task(file, name=first.name, pretrained=first.pretrained)
            if backbone_of(task) != backbone_of(first):
                raise UserError(f"{name} has another part or size of the model than the adapters of this server.")
            texts = 0 if task.vision_only else len(task.classnames) * len(task.used_prompts().evaluation)
            if texts > MOST_TEXTS:
                what = f"{name} has {texts:,} texts (classes x prompts), more than {MOST_TEXTS:,}"
                raise UserError(f"{what}. Serve it alone: serve --adapter PATH")
            self.shrink(kept, size)
            self.tasks.load(name, task)
        try:
            task.to(first.device)
            task.saved = replace(file, tensors={}, extra={}, bases=None)
            image = torch.zeros(1, 3, task.frame.size, task.frame.size, device=first.device)
            check_numbers(self.tasks.probabilities(image, [name])[0], name)
            with self.tasks.adapters.using(name):
                tensors = _storages(task) | _storages(self.tasks.head(name) or nn.Module())
            own = {place: size for place, size in tensors.items() if place not in self._base}
            self._check_size(name, sum(own.values()))
        except Exception:
            self._drop(name)
            raise
        self._loaded[name] = files, own

    def _check_size(self, name: str, size: int, bound: str = "") -> None:
        if size > self.limit:
            allowed = f"serve --adapter-memory {self.limit / 1e6:g} allows"
            raise UserError(f"{name} needs {bound}{size / 1e6:,.1f} MB, more than {allowed}.")

    def _check_file(self, file: AdapterFile) -> None:
        """Refuse another task or base model."""
        check_classes(file.config, file.path)
        first = self.tasks.first.saved
        base, ours = file.config.get("base_model", {}), first.config.get("base_model", {}) if first else {}
        own = {"weights_sha256_sampled": None}  # without the weights that the adapter trains; loading compares it
        if base | own != ours | own:
            theirs = base_words(base) or "an unknown model"
            raise UserError(f"{file.path} has another base model, {theirs}; this server has {base_words(ours)}.")


def _check_described(file: Path, name: str) -> None:
    """Refuse a file whose description takes too long to read."""
    with file.open("rb") as opened:
        described = int.from_bytes(opened.read(8), "little") if file.suffix == SUFFIX else file.stat().st_size
    if described > MOST_DESCRIBED:
        what = f"its config or a header has {described:,} bytes, more than {MOST_DESCRIBED:,}"
        raise UserError(f"{name} is damaged or was changed: {what}.")


def _storages(module: nn.Module) -> dict[int, int]:
    """Return the bytes of the tensors of a module, by their places in memory; also of what it has computed."""
    computed = (each for each in vars(module).values() if isinstance(each, Tensor))
    tensors = (each.untyped_storage() for each in (*module.parameters(), *module.buffers(), *computed))
    return {each.data_ptr(): each.nbytes() for each in tensors}


def _copied(files: Files, folder: Path) -> Path:
    """Copy an adapter into a private folder, and return the copy."""
    for file in files.files:
        shutil.copyfile(file, folder / file.name, follow_symlinks=False)
    return folder if len(files.files) > 1 else folder / files.path.name


def _refusal(name: str, error: Exception) -> HTTPException:
    """Return the response for an error while an adapter was loaded; with status 503 it passes."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, OSError) or out_of_memory(error):
        why = getattr(error, "strerror", None) or "memory ran out"
        return HTTPException(503, f"the adapter {name} cannot be loaded now: {why}")
    if not isinstance(error, UserError):
        log.exception("The adapter %s cannot be loaded.", name)
    text = str(error) if isinstance(error, UserError) else f"it cannot be loaded ({type(error).__name__})"
    return HTTPException(422, shorten(" ".join(f"the adapter {name} cannot be used: {text}".split()), 280))
