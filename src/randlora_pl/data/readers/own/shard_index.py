"""Index of tar shards: the shards of a root and their contents, built once and stored."""

import logging
import os
import re
import time
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from randlora_pl.data.locations import as_typed, expanded, is_command, is_pattern, is_url, listed, without_query
from randlora_pl.data.readers import listing_cache as listing
from randlora_pl.data.readers.dispatch import SPLITS, numbers_of
from randlora_pl.data.readers.own import tar_files as tars
from randlora_pl.data.readers.own.folder import ALIASES
from randlora_pl.data.string_array import Strings
from randlora_pl.utils.errors import UserError

EXPECTED = "expected a folder of .tar files, a pattern such as train-{000..099}.tar, or a text file that lists them"

_SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}
_READERS = 8
_PROGRESS_S = 10

log = logging.getLogger("randlora_pl")


@dataclass(frozen=True)
class ShardPaths:
    """Locations of the shards.

    Attributes:
        title: Root as set by the user.
        by_split: Paths or URLs of the shards by split.
        beside: Folder of accompanying files; None for URLs.
    """

    title: str
    by_split: dict[str, list[str]]
    beside: Path | None

    def lines(self, names: Sequence[str]) -> list[str]:
        """Return the lines of the first existing file of ``names`` beside the shards, or [].

        Raises:
            UserError: The file cannot be read.
        """
        for path in [] if self.beside is None else [self.beside / name for name in names]:
            if path.is_file():
                try:
                    text = path.read_text(encoding="utf-8-sig")
                except (OSError, UnicodeDecodeError) as error:
                    raise UserError(f"{path} cannot be read: {error}") from error
                return [line.strip() for line in text.splitlines() if line.strip()]
        return []


def find(root: Path) -> ShardPaths:
    """Return the shards of a root.

    Raises:
        UserError: No shards are found, one is missing, or the splits are ambiguous.
    """
    title = as_typed(root)
    beside: Path | None
    if root.is_dir():
        found, beside = _in_folder(root), root
    elif root.is_file() and root.suffix != ".tar":
        found, beside = listed(root), root.parent
    elif root.is_file() or is_url(title) or is_pattern(title) or is_command(title):
        found = [str(root)] if root.is_file() else expanded(title)
        beside = None if is_url(found[0]) else Path(found[0]).parent
    else:
        raise UserError(f"{root} does not exist; {EXPECTED}. Set it with --data.root")
    for location in found:
        if re.search(r"\.(tar\.\w+|tgz)$", without_query(location)):
            raise UserError(
                f"{location} is compressed, so its members cannot be read individually. Uncompress it first"
            )
        if not is_url(location) and not Path(location).is_file():
            raise UserError(
                f"The shard {location} does not exist or is not a file ({len(found):,} are listed by {title})"
            )
    twice = len(found) - len(set(found))
    if twice:
        raise UserError(f"{title} lists {twice:,} shards more than once")
    by_split: dict[str, list[str]] = {}
    names = {location: PurePosixPath(without_query(location)) for location in found}
    several = len({name.parent.name for name in names.values()}) > 1
    for location, name in names.items():
        # a common folder is not a split, even if it is named test
        below = os.path.relpath(location, root) if beside == root else str(name) if several else name.name
        by_split.setdefault(split_of(below), []).append(location)
    if by_split.keys() == {""}:
        return ShardPaths(title, {"train": by_split[""]}, beside)
    if "" in by_split:
        raise UserError(
            f"{by_split[''][0]} has no split in its name, but other shards of {title} do. "
            "Rename it to train-..., val-... or test-..."
        )
    return ShardPaths(title, {split: by_split[split] for split in SPLITS if split in by_split}, beside)


def _in_folder(root: Path) -> list[str]:
    """Return the .tar files in a folder and in its sub-folders named after splits."""
    parts = [root, *sorted(path for path in root.iterdir() if path.is_dir() and path.name.lower() in _SPLIT_OF)]
    files = sorted(
        path for part in parts for path in part.iterdir() if not path.name.startswith(".") and path.is_file()
    )
    tar = [str(path) for path in files if path.suffix == ".tar"]
    if not tar:
        packed = [path for path in files if re.search(r"\.(tar\.\w+|tgz)$", path.name)]
        if packed:
            return [str(packed[0])]
        raise UserError(f"{root} has no .tar files; {EXPECTED}")
    return tar


def split_of(shard: str) -> str:
    """Return the split in a shard's file or folder name, or ""."""
    path = PurePosixPath(shard.replace("\\", "/"))
    for word in (*re.findall("[a-z]+", path.stem.lower()), path.parent.name.lower()):
        if word in _SPLIT_OF:
            return _SPLIT_OF[word]
    return ""


def index(shard_paths: ShardPaths, split: str) -> listing.Found:
    """Return the index of a split; build it if it is not stored.

    Columns are ``shard``, ``offset``, ``length``, ``label`` (index in the text ``labels``) and ``numbers``; texts are
    ``members``, ``labels``, and ``keys`` if they differ from the members.

    Raises:
        UserError: A shard cannot be indexed, or two samples have the same key.
    """
    paths = shard_paths.by_split[split]

    def make(watch: listing.IndexProgress) -> listing.Found:
        for path, state in zip(paths, _states(paths), strict=True):
            if is_url(path):
                watch.add(path, state)
                watch.settled &= tars.marked(state)
            else:
                watch(path)
        return _index(shard_paths, paths, by_key=split == "train")

    absolute = [path if is_url(path) else os.path.abspath(path) for path in paths]  # noqa: PTH100 (links stay)
    title = shard_paths.title if is_url(shard_paths.title) else os.path.abspath(shard_paths.title)  # noqa: PTH100
    return listing.stored(("webdataset", title, split), absolute, make, _states, least=1)


def _states(paths: Sequence[str]) -> list[tuple[int, int, int]]:
    with ThreadPoolExecutor(_READERS) as threads:
        return list(threads.map(lambda path: tars.state(path) if is_url(path) else listing.stamp(path), paths))


def _index(shard_paths: ShardPaths, paths: Sequence[str], by_key: bool) -> listing.Found:
    members: list[str] = []
    shard: list[int] = []
    offset: list[int] = []
    length: list[int] = []
    label: list[int] = []
    numbers: dict[str, int] = {}
    remarks: list[str] = []
    logged = time.monotonic()
    with ThreadPoolExecutor(_READERS) as threads:
        for number, (samples, remark) in enumerate(threads.map(tars.scan, paths)):
            remarks += [remark] if remark else []
            for sample in samples:
                members.append(sample.member)
                shard.append(number)
                offset.append(sample.offset)
                length.append(sample.length)
                label.append(numbers.setdefault(unicodedata.normalize("NFC", sample.label), len(numbers)))
            if time.monotonic() - logged > _PROGRESS_S:
                logged = time.monotonic()
                log.info("%s: indexed %s of %s shards", shard_paths.title, f"{number + 1:,}", f"{len(paths):,}")
    if not members:
        raise UserError(f"The shards of {shard_paths.title} have no samples; the first is {paths[0]}")
    keys = _keys(members, shard, paths)
    order = np.asarray(sorted(range(len(keys)), key=keys.__getitem__) if by_key else range(len(keys)), dtype=np.int64)
    ordered = [keys[position] for position in order.tolist()]
    columns = {
        name: np.asarray(column, dtype=np.int64)[order]
        for name, column in (("shard", shard), ("offset", offset), ("length", length), ("label", label))
    }
    texts = {
        "members": Strings.of([members[position] for position in order.tolist()]),
        "labels": Strings.of(list(numbers)),
    }
    if keys is not members:
        texts["keys"] = Strings.of(ordered)
    more = f" (and {len(remarks) - 1} more shards)" if len(remarks) > 1 else ""
    notes = (remarks[0] + more,) if remarks else ()
    return listing.Found(columns | {"numbers": numbers_of(ordered)}, texts, notes)


def _keys(members: list[str], shard: list[int], paths: Sequence[str]) -> list[str]:
    """Return the key of each sample (see `shards`).

    Raises:
        UserError: Two samples have the same key.
    """
    seen: set[str] = set()
    shared = {name for name in members if name in seen or seen.add(name)}  # type: ignore[func-returns-value]
    if not shared and "".join(members).isascii():
        return members
    stems = [PurePosixPath(without_query(path).replace("\\", "/")).stem for path in paths]
    keys = [f"{stems[part]}/{name}" if name in shared else name for name, part in zip(members, shard, strict=True)]
    keys = [unicodedata.normalize("NFC", key) for key in keys]
    first: dict[str, int] = {}
    for key, part in zip(keys, shard, strict=True):
        if key in first:
            raise UserError(f"{paths[first[key]]} and {paths[part]} both have {key!r}. Rename the shards")
        first[key] = part
    return keys
