"""Cache of directory listings between runs, invalidated when a folder changes.

Listing, sorting and hashing a million names takes seconds on a fast disk and minutes on a slow one. A stored listing is
valid if every listed folder still has the same times and inode: adding, removing or renaming a file changes
them. Listings of folders changed within the last seconds are not stored, because a file system with coarse times
would not show a second change; nor are listings of mounted object stores, whose folders have artificial times.
"""

import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data.images.decode import FileImages, PathsBelow
from randlora_pl.data.readers.dispatch import Samples, numbers_of
from randlora_pl.data.string_array import Strings
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import atomic_file
from randlora_pl.utils.files.cache_folder import cache_folder

VERSION = 2
"""Version of the stored format; raise it to invalidate old files."""

LEAST = 10_000
"""Minimum number of samples for storing a listing."""

LOGGED = 100_000
"""Minimum number of samples for logging that a listing was stored or used."""

SETTLED_NS = 2 * 10**9
"""Minimum age of a change in nanoseconds: FAT has steps of 2 s."""

log = logging.getLogger("randlora_pl")
_ignore_stored: ContextVar[bool] = ContextVar("ignore_stored", default=False)


@dataclass(frozen=True)
class Found:
    """Listing result as columns.

    Attributes:
        columns: int64 arrays by name.
        texts: Strings by name.
        notes: Warnings, repeated when the listing is reused.
    """

    columns: Mapping[str, NDArray[np.int64]]
    texts: Mapping[str, Strings]
    notes: tuple[str, ...] = ()


@dataclass
class IndexProgress:
    """Recorder of the paths that a listing depends on; called with each before it is listed or read.

    Attributes:
        paths: Recorded paths.
        stamps: State of each path, three numbers (see `stamp`).
        settled: True if no path was changed recently.
        timeless: Devices whose folders have meaningless times.
    """

    paths: list[str] = field(default_factory=list)
    stamps: list[tuple[int, int, int]] = field(default_factory=list)
    settled: bool = True
    timeless: frozenset[int] = field(default_factory=lambda: timeless())

    def __call__(self, path: str | os.PathLike[str]) -> None:
        """Record the state of a folder or file; an inaccessible one is not settled."""
        try:
            state = os.stat(path)  # noqa: PTH116 (a Path for each of ten thousand folders is slow)
        except OSError:
            self.settled = False
            return
        mark = _stamp(state)
        self.add(os.fspath(path), mark)
        self.settled &= max(mark[:2]) + SETTLED_NS < time.time_ns()
        self.settled &= not (stat.S_ISDIR(state.st_mode) and state.st_dev in self.timeless)

    def add(self, path: str, state: tuple[int, int, int]) -> None:
        """Record a path with a known state."""
        self.paths.append(path)
        self.stamps.append(state)


def stamp(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Return modification and change time in nanoseconds, and the inode of a folder or the size of a file.

    Copying tools set the modification time; the change time cannot be set.

    Raises:
        OSError: The path does not exist.
    """
    return _stamp(os.stat(path))  # noqa: PTH116 (a Path for each of ten thousand folders is slow)


def _stamp(state: os.stat_result) -> tuple[int, int, int]:
    third = state.st_ino % 2**63 if stat.S_ISDIR(state.st_mode) else state.st_size
    return state.st_mtime_ns, state.st_ctime_ns, third


def timeless(mounts: str = "/proc/self/mountinfo") -> frozenset[int]:
    """Return FUSE devices, such as object stores, whose folders may have arbitrary times.

    Args:
        mounts: Linux's list of mounts; without it the result is empty.
    """
    found = set()
    try:
        with open(mounts, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
            for line in lines:
                left, _, right = line.partition(" - ")
                if re.match(r"fuse(\.| )", right):  # not fuseblk: NTFS, on a disk
                    major, minor = left.split()[2].split(":")
                    found.add(os.makedev(int(major), int(minor)))
    except (OSError, ValueError, IndexError):
        pass
    return frozenset(found)


def stamps(paths: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return the state of each path.

    Raises:
        OSError: A path does not exist.
    """
    return [stamp(path) for path in paths]


@contextmanager
def ignore_stored() -> Iterator[None]:
    """Ignore stored listings within the context; new ones are stored."""
    token = _ignore_stored.set(True)
    try:
        yield
    finally:
        _ignore_stored.reset(token)


def stored(
    name: Sequence[str],
    recipe: Sequence[str],
    find: Callable[[IndexProgress], Found],
    states: Callable[[Sequence[str]], Sequence[tuple[int, int, int]]] = stamps,
    least: int | None = None,
) -> Found:
    """Return the cached result of ``find``, or call it if anything has changed.

    An unreadable or unwritable cache only costs time.

    Args:
        name: Dataset, path and split. A stored listing with the same name is replaced.
        recipe: All other inputs of the result; a different recipe invalidates the cache.
        find: Function that lists the files and records the paths it used.
        states: Function that returns the current states of recorded paths; OSError if one does not exist.
        least: Minimum number of samples (length of the first column) for storing; default `LEAST`.

    Raises:
        UserError: ``find`` raised it; errors are not stored.
    """
    path = cache_folder() / "listings" / f"{_digest([str(VERSION), *name])}.npz"
    made_by = _digest(recipe)
    if not _ignore_stored.get():
        found = _load(path, made_by, states)
        if found is not None:
            if _size(found) >= LOGGED:
                log.info("%s: %s files, from the stored listing", name[1], f"{_size(found):,}")
            return found
    watch = IndexProgress()
    begin = time.perf_counter()
    found = find(watch)
    seconds = time.perf_counter() - begin
    kept = False
    if _size(found) >= (LEAST if least is None else least) and watch.settled:
        kept = _save(path, made_by, found, watch)
    if _size(found) >= LOGGED:
        after = ", stored for the next run" if kept else ""
        log.info("%s: %s files, listed in %.1f s%s", name[1], f"{_size(found):,}", seconds, after)
    return found


def tree(paths: list[str], labels: list[int], keys: list[str] | None = None, notes: Sequence[str] = ()) -> Found:
    """Return columns of image files in the order of their keys.

    Args:
        paths: Paths with forward slashes, relative to a folder.
        labels: Label of each file.
        keys: Key of each file; default: its path.
        notes: See `Found`.

    Raises:
        UserError: Two files have the same key.
    """
    names = paths if keys is None else keys
    order = sorted(range(len(names)), key=names.__getitem__)
    ordered = [names[index] for index in order]
    for index in range(1, len(ordered)):
        if ordered[index] == ordered[index - 1]:
            raise UserError(f"{ordered[index]!r} is listed twice")
    columns = {
        "labels": np.asarray(labels, dtype=np.int64)[np.asarray(order, dtype=np.int64)],
        "numbers": numbers_of(ordered),
    }
    texts = {"keys": Strings.of(ordered)}
    if names != paths:
        texts["paths"] = Strings.of([paths[index] for index in order])
    return Found(columns, texts, tuple(notes))


def samples_of(found: Found, home: Path, classes: Sequence[str]) -> Samples:
    """Build samples from the columns of `tree` with paths below ``home``; log the notes."""
    for note in found.notes:
        log.warning("%s", note)
    images = FileImages(PathsBelow(home, found.texts.get("paths", found.texts["keys"])))
    labels = found.columns["labels"]
    samples = Samples(images, np.arange(len(labels)), labels, found.texts["keys"], tuple(classes))
    return samples.numbered(found.columns["numbers"])


def _size(found: Found) -> int:
    return len(next(iter(found.columns.values())))


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()


def _save(path: Path, recipe: str, found: Found, watch: IndexProgress) -> bool:
    """Write a listing; return True on success."""
    about = {"recipe": recipe, "notes": found.notes, "columns": list(found.columns), "texts": list(found.texts)}
    arrays: dict[str, Any] = {f"column {name}": column for name, column in found.columns.items()}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    arrays["stamps"] = np.asarray(watch.stamps, np.int64)
    texts = {"watched": Strings.of(watch.paths)} | {f"text {name}": text for name, text in found.texts.items()}
    for name, text in texts.items():
        arrays |= {f"{name} raw": text.raw, f"{name} starts": text.starts, f"{name} ends": text.ends}
    try:
        with atomic_file(path) as stream:
            np.savez(stream, **arrays)
    except OSError as error:
        log.debug("the listing cannot be stored in %s: %s", path, error)
        return False
    return True


def _load(path: Path, recipe: str, states: Callable[[Sequence[str]], Sequence[tuple[int, int, int]]]) -> Found | None:
    """Load a stored listing, or return None if it is missing or outdated."""
    try:
        with np.load(path, allow_pickle=False) as file:

            def text(name: str) -> Strings:
                return Strings(*(file[f"{name} {part}"] for part in ("raw", "starts", "ends")))

            about = json.loads(file["about"].tobytes())
            if about["recipe"] != recipe:
                return None
            if not np.array_equal(file["stamps"], np.asarray(states(list(text("watched"))), np.int64)):
                log.debug("what %s lists has changed", path)
                return None
            columns = {name: file[f"column {name}"] for name in about["columns"]}
            texts = {name: text(f"text {name}") for name in about["texts"]}
            return Found(columns, texts, tuple(about["notes"]))
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file raises many types; the folder is listed again
        log.debug("the stored listing %s cannot be used: %s", path, error)
        return None
