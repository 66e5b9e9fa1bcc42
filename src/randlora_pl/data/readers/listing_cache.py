"""Cache of directory listings between runs, mapped into memory that processes share, invalidated when a folder changes.

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
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data.readers.dispatch import Samples, key_order, numbers_of
from randlora_pl.data.sources import FileImages, PathsBelow, Strings
from randlora_pl.utils.files import atomic_file
from randlora_pl.utils.machine import cache_folder

LEAST = 10_000
"""Minimum number of samples for storing a listing."""

LOGGED = 100_000
"""Minimum number of samples for logging that a listing was stored or used."""

SETTLED_NS = 2 * 10**9
"""Minimum age of a change in nanoseconds: FAT has steps of 2 s."""

Stamp = tuple[int, int, int]
"""Modification and change time in nanoseconds, and the inode of a folder or the size of a file; two zeros if unknown.

Copying tools set the modification time; the change time cannot be set.
"""

Watch = Callable[..., None]
"""Function that records the states of the paths that a listing depends on."""

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

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def timeless(mounts: str = "/proc/self/mountinfo") -> set[int]:
    """Return FUSE devices in Linux's list of mounts, such as object stores, whose folders may have arbitrary times."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    fuse = [line for line in lines if re.search(r" - fuse[. ]", line)]  # not fuseblk: NTFS, on a disk
    return {os.makedev(*map(int, line.split()[2].split(":"))) for line in fuse}


def stamp(path: str) -> Stamp:
    """Return the state of a path."""
    try:
        state = os.stat(path)  # noqa: PTH116 (a Path for each of ten thousand folders is slow)
    except OSError:
        return 0, 0, 0
    third = state.st_ino % 2**63 if stat.S_ISDIR(state.st_mode) else state.st_size
    return state.st_mtime_ns, state.st_ctime_ns, third


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
    find: Callable[[Watch], Found],
    states: Callable[[Sequence[str]], Sequence[Stamp]] = lambda paths: list(map(stamp, paths)),
    least: int | None = None,
) -> Found:
    """Return the cached result of ``find``, or call it if anything has changed; its errors are not stored.

    An unreadable or unwritable cache only costs time.

    Args:
        name: Dataset, path and split. A stored listing with the same name is replaced.
        recipe: All other inputs of the result; a different recipe invalidates the cache.
        find: Function that lists the files, and records each path before it is listed or read.
        states: Function that returns the current states of recorded paths.
        least: Minimum number of samples for storing; default `LEAST`.
    """
    version = 4  # of the stored format; raise it to invalidate old files
    digest = hashlib.sha256(json.dumps([version, *name]).encode()).hexdigest()
    path = cache_folder() / "listings" / digest
    found = None if _ignore_stored.get() else _load(path, recipe, states)
    how = "from the stored listing"
    if found is None:
        begin = time.time_ns()
        seen: dict[str, Stamp] = {}
        found = find(lambda *paths: seen.update(zip(paths, states(paths), strict=True)))
        how = f"listed in {(time.time_ns() - begin) / 1e9:.1f} s"
        if len(found) >= (LEAST if least is None else least):
            devices = timeless()
            folders = filter(os.path.isdir, seen if devices else ())
            # a later change would be visible in the states
            settled = all(0 < max(state[:2]) < begin - SETTLED_NS for state in seen.values()) and not any(
                os.stat(folder).st_dev in devices  # noqa: PTH116 (as in `stamp`)
                for folder in folders
            )
            if settled and _save(path, recipe, found, seen):
                how += ", stored for the next run"
    if len(found) >= LOGGED:
        log.info("%s: %s files, %s", name[1], f"{len(found):,}", how)
    return found


def tree(paths: list[str], labels: list[int], keys: list[str] | None = None, notes: Sequence[str] = ()) -> Found:
    """Return columns of image files in the order of their keys, by default their paths.

    Paths have forward slashes, and are relative to a folder.
    """
    keys = keys or paths
    order = key_order(keys)
    ordered = [keys[index] for index in order.tolist()]
    texts = {"keys": Strings.of(ordered)}
    if keys != paths:
        texts["paths"] = Strings.of(paths).take(order)
    columns = {"labels": np.asarray(labels, dtype=np.int64)[order], "numbers": numbers_of(ordered)}
    return Found(columns, texts, tuple(notes))


def samples_of(found: Found, home: Path, classes: Sequence[str]) -> Samples:
    """Build samples from the columns of `tree` with paths below ``home``; log the notes."""
    for note in found.notes:
        log.warning("%s", note)
    images = FileImages(PathsBelow(home, found.texts.get("paths", found.texts["keys"])))
    labels = found.columns["labels"]
    keys, numbers = found.texts["keys"], found.columns["numbers"]
    return Samples(images, np.arange(len(labels)), labels, keys, tuple(classes), known_numbers=numbers)


def _save(path: Path, recipe: Sequence[str], found: Found, seen: Mapping[str, Stamp]) -> bool:
    arrays: dict[str, NDArray[Any]] = dict(found.columns)
    for name, text in found.texts.items():
        arrays |= {f"{name}/{part}": array for part, array in vars(text).items() if array is not None}
    about = {"recipe": recipe, "stamps": seen, "notes": found.notes}
    about |= {"arrays": {name: [each.dtype.str, each.nbytes, zlib.crc32(each.data)] for name, each in arrays.items()}}
    try:
        with atomic_file(path) as stream:
            stream.write(json.dumps(about).encode() + b"\n")
            for array in arrays.values():
                stream.write(bytes(-stream.tell() % array.itemsize))
                stream.write(array.data)
    except OSError as error:
        log.debug("the listing cannot be stored in %s: %s", path, error)
        return False
    return True


def _load(path: Path, recipe: Sequence[str], states: Callable[[Sequence[str]], Sequence[Stamp]]) -> Found | None:
    """Map a stored listing, or return None if it is missing, damaged or outdated."""
    try:
        with path.open("rb") as stream:
            about = json.loads(stream.readline())
            place, content = stream.tell(), np.memmap(stream, np.uint8, "c")
        if about["recipe"] != list(recipe):
            return None
        if list(about["stamps"].values()) != list(map(list, states(list(about["stamps"])))):
            return None
        columns: dict[str, NDArray[np.int64]] = {}
        texts: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, (kind, size, checksum) in about["arrays"].items():
            place += -place % np.dtype(kind).itemsize
            array = np.asarray(content[place : place + size]).view(kind)
            place += size
            if zlib.crc32(array.data) != checksum:
                raise ValueError(f"{name} is damaged")
            owner, _, part = name.partition("/")
            if part:
                texts[owner][part] = array
            else:
                columns[owner] = array
        return Found(columns, {name: Strings(**parts) for name, parts in texts.items()}, tuple(about["notes"]))
    except Exception as error:  # no file, or a damaged one, which raises many types; the folder is listed again
        log.debug("the stored listing %s cannot be used: %s", path, error)
        return None
