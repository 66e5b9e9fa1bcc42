"""Images in tar shards (WebDataset), read by a stored index: shard, byte range and label.

The sample order is a function of numbered samples, so that subsets, splits, resume and ranks work as for any other
dataset; each process reads only the bytes of its own samples.
"""

import logging
import os
import re
import time
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.locations import as_typed, expanded, is_command, is_pattern, is_url, listed, without_query
from randlora_pl.data.readers import listing_cache as listing
from randlora_pl.data.readers import tar_files as tars
from randlora_pl.data.readers.dispatch import SPLIT_OF, SPLITS, Samples, key_order, numbers_of, source_split
from randlora_pl.data.sources import EncodedImages, Strings, decode
from randlora_pl.data.validate import check_templates
from randlora_pl.utils.errors import UserError, errors_in, near

EXPECTED = "expected a folder of .tar files, a pattern such as train-{000..099}.tar, or a text file that lists them"

_READERS = 8


@dataclass(frozen=True)
class ShardPaths:
    """Locations of the shards.

    Attributes:
        title: Root as typed.
        by_split: Paths or URLs of the shards by split.
        beside: Folder of accompanying files; None for URLs.
    """

    title: str
    by_split: dict[str, list[str]]
    beside: Path | None

    def lines(self, names: Sequence[str]) -> list[str]:
        """Return the lines of the first existing file of ``names`` beside the shards, or []."""
        there = [] if self.beside is None else [self.beside / name for name in names if (self.beside / name).is_file()]
        try:
            lines = there[0].read_text(encoding="utf-8-sig").splitlines() if there else []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{there[0]} cannot be read: {error}") from error
        return [line.strip() for line in lines if line.strip()]


def find(root: Path) -> ShardPaths:
    """Return the shards of a root: at least one, each an existing file or a URL, and of a clear split."""
    title, packed = as_typed(root), r"\.(tar\.\w+|tgz)$"
    beside: Path | None
    if root.is_dir():
        beside = root
        parts = [root, *sorted(path for path in root.iterdir() if path.is_dir() and path.name.lower() in SPLIT_OF)]
        files = sorted(
            path for part in parts for path in part.iterdir() if not path.name.startswith(".") and path.is_file()
        )
        found = [str(path) for path in files if path.suffix == ".tar"]
        found = found or [str(path) for path in files if re.search(packed, path.name)]  # refused below
        if not found:
            raise UserError(f"{root} has no .tar files; {EXPECTED}")
    elif root.is_file() and root.suffix != ".tar":
        found, beside = listed(root), root.parent
    elif root.is_file() or is_url(title) or is_pattern(title) or is_command(title):
        found = [str(root)] if root.is_file() else expanded(title)
        beside = None if is_url(found[0]) else Path(found[0]).parent
    else:
        raise UserError(f"{root} does not exist; {EXPECTED}. Set it with --data.root")
    for location in found:
        if re.search(packed, without_query(location)):
            raise tars.compressed(location)
        if not is_url(location) and not Path(location).is_file():
            of = f"{len(found):,} are listed by {title}"
            raise UserError(f"The shard {location} does not exist or is not a file ({of})")
    if twice := len(found) - len(set(found)):
        raise UserError(f"{title} lists {twice:,} shards more than once")
    by_split: dict[str, list[str]] = defaultdict(list)
    names = {location: PurePosixPath(without_query(location)) for location in found}
    several = len({name.parent.name for name in names.values()}) > 1
    for location, name in names.items():
        # a common folder is not a split, even if it is named test
        below = os.path.relpath(location, root) if beside == root else str(name) if several else name.name
        by_split[split_of(below)].append(location)
    if by_split.keys() == {""}:
        return ShardPaths(title, {"train": by_split[""]}, beside)
    if "" in by_split:
        raise UserError(
            f"{by_split[''][0]} has no split in its name, but other shards of {title} do. "
            "Rename it to train-..., val-... or test-..."
        )
    return ShardPaths(title, {split: by_split[split] for split in SPLITS if split in by_split}, beside)


def split_of(shard: str) -> str:
    """Return the split in a shard's file or folder name, or ""."""
    path = PurePosixPath(shard.replace("\\", "/"))
    parts = (*re.findall("[a-z]+", path.stem.lower()), path.parent.name.lower())
    return next((SPLIT_OF[word] for word in parts if word in SPLIT_OF), "")


def index(shard_paths: ShardPaths, split: str) -> listing.Found:
    """Return the index of a split; build it if it is not stored.

    By image, in the order of the shards: the columns ``shard``, ``offset`` and ``length``, the text ``members``, and
    ``keys`` if they differ. By sample: the columns ``rows``, ``label`` (index in the text ``labels``) and ``numbers``.
    """
    paths = shard_paths.by_split[split]

    def make(watch: listing.Watch) -> listing.Found:
        watch(*paths)
        return _index(shard_paths, paths, by_key=split == "train")

    title, *absolute = (
        path if is_url(path) else os.path.abspath(path)  # noqa: PTH100 (links stay)
        for path in (shard_paths.title, *paths)
    )
    return listing.stored(("webdataset", title, split), absolute, make, _states, least=1)


def _states(paths: Sequence[str]) -> list[listing.Stamp]:
    with ThreadPoolExecutor(_READERS) as threads:
        return list(threads.map(lambda path: tars.state(path) if is_url(path) else listing.stamp(path), paths))


def _index(shard_paths: ShardPaths, paths: Sequence[str], by_key: bool) -> listing.Found:
    columns = {name: array("q") for name in ("shard", "offset", "length", "label")}
    labels: dict[str, int] = {}
    remarks: list[str] = []

    def members() -> Iterator[str]:
        logged = time.monotonic()
        starts = range(0, len(paths), 4 * _READERS)  # else what is read early would wait in memory
        shards = chain.from_iterable(threads.map(tars.scan, paths[start : start + 4 * _READERS]) for start in starts)
        for number, (samples, remark) in enumerate(shards):
            remarks.extend([remark] if remark else [])
            for member, offset, length, text in samples:
                label = labels.setdefault(unicodedata.normalize("NFC", text), len(labels))
                for column, value in zip(columns.values(), (number, offset, length, label), strict=True):
                    column.append(value)
                yield member
            if time.monotonic() - logged > 10:
                logged = time.monotonic()
                log.info("%s: indexed %s of %s shards", shard_paths.title, f"{number + 1:,}", f"{len(paths):,}")

    with ThreadPoolExecutor(_READERS) as threads:  # not in Python lists: a directory may have 14 million samples
        keys = texts = Strings.of(members())
    if not len(texts):
        raise UserError(f"The shards of {shard_paths.title} have no samples; the first is {paths[0]}")
    numbers = numbers_of(keys)
    if not texts.is_ascii or len(np.unique(numbers)) < len(numbers):
        named = list(texts)
        repeated = {name for name, times in Counter(named).items() if times > 1}
        stems = [PurePosixPath(without_query(path).replace("\\", "/")).stem for path in paths]
        first: dict[str, int] = {}
        for name, part in zip(named, columns["shard"], strict=True):
            key = unicodedata.normalize("NFC", f"{stems[part]}/{name}" if name in repeated else name)
            if key in first:
                raise UserError(f"{paths[first[key]]} and {paths[part]} both have {key!r}. Rename the shards")
            first[key] = part
        keys = Strings.of(first)
        numbers = numbers_of(keys)
    rows = key_order(keys) if by_key else np.arange(len(keys))
    arrays = {name: np.frombuffer(column, np.int64) for name, column in columns.items()}
    arrays |= {"rows": rows, "label": arrays["label"][rows], "numbers": numbers[rows]}
    held = {"members": texts, "labels": Strings.of(labels)} | ({} if keys is texts else {"keys": keys})
    more = f" (and {len(remarks) - 1} more shards)" if len(remarks) > 1 else ""
    return listing.Found(arrays, held, (remarks[0] + more,) if remarks else ())


NAMES = "classnames.txt"

log = logging.getLogger("randlora_pl")


@dataclass(frozen=True)
class ShardImages(EncodedImages):
    """Images inside tar files.

    Attributes:
        shards: Paths or URLs of the shards.
        shard: int64 (n,), shard index of each image.
        offset: int64 (n,), first byte of each image.
        length: int64 (n,), number of bytes.
        members: Member name of each image.
    """

    shards: Sequence[str]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    members: Strings

    def __len__(self) -> int:
        return len(self.shard)

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Decode image ``index`` to RGB (see `decode`).

        Raises:
            UserError: The shard cannot be read, or has no image at this offset; the message names both.
        """
        shard = self.shards[self.shard[index]]
        content = tars.read_range(shard, int(self.offset[index]), int(self.length[index]))
        return decode(self.name(index), short, content, most_pixels=self.most_pixels, background=self.background)

    def suffix(self, index: int) -> str:
        """Return the suffix of the member."""
        return PurePath(str(self.members[index])).suffix.lower()

    def name(self, index: int) -> str:
        """Return ``SHARD:MEMBER``."""
        return f"{self.shards[self.shard[index]]}:{self.members[index]}"


def shards(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read the samples of one split.

    Splits are sub-folders (``train/``, ``val/``, ``test/``) or words in the names of the shards (``val-000.tar``).
    Labels are numbers or names; class names are in ``classnames.txt`` beside the shards, or are the sorted labels. A
    sample's key is the member name of its image, so that it does not depend on the location or split of the shards;
    if several shards use a name, the shard's name is prepended. Training samples are in the order of their keys,
    others in the order of the shards for sequential reading.

    Raises:
        UserError: Shards are missing or damaged, or labels are wrong.
    """
    del row
    shard_paths = find(root)
    names = shard_paths.lines((NAMES,))
    templates = shard_paths.lines(("templates.txt", "zeroshot_classification_templates.txt"))
    there = shard_paths.by_split
    if "train" not in there and (split == "train" or not names):
        raise UserError(
            f"{shard_paths.title} has no train shards, only {', '.join(there)}. "
            f"Rename them to train-..., or put them into train/; testing alone needs {NAMES}"
        )
    own = source_split(split, {"train", *there}, shard_paths.title)
    if own is None:
        return None
    class_split = "train" if "train" in there else own  # the split whose labels define the classes
    found = index(shard_paths, own)
    of_classes = found if class_split == own else index(shard_paths, class_split)
    classes, by_name = _classes(shard_paths, class_split, of_classes, names)
    used = []
    for text in found.texts["labels"]:
        label = _number(text) if by_name is None else by_name.get(text)
        if label is None or not 0 <= label < len(classes):
            least = f"a number from 0 to {len(classes) - 1}" if by_name is None else "a class of the train shards"
            hint = near(text, by_name or ())
            raise UserError(f"{_first(shard_paths, own, found, text)}: the label {text!r} is not {least}.{hint}")
        used.append(label)
    labels = np.asarray(used, dtype=np.int64)[found.columns["label"]]
    for note in found.notes:
        log.warning("%s", note)
    shard, offset, length = (found.columns[name] for name in ("shard", "offset", "length"))
    images = ShardImages(there[own], shard, offset, length, found.texts["members"])
    rows = found.columns["rows"]
    keys = found.texts.get("keys", found.texts["members"]).take(rows)
    prompts = tuple(template.replace("{c}", "{}") for template in templates)  # {c}: as in clip-benchmark's files
    with errors_in(shard_paths.beside):
        check_templates(prompts or None, captions=False)
    numbers = found.columns["numbers"]
    return Samples(images, rows, labels, keys, tuple(classes), templates=prompts, known_numbers=numbers)


def _classes(
    shard_paths: ShardPaths, split: str, found: listing.Found, names: Sequence[str]
) -> tuple[list[str], dict[str, int] | None]:
    """Return (class names, label of each name used by the shards, or None if they use numbers)."""
    used = list(found.texts["labels"])
    numeric = [text for text in used if _number(text) is not None]
    if numeric and len(numeric) < len(used):
        other = next(text for text in used if _number(text) is None)
        raise UserError(f"{shard_paths.title}: some labels are numbers ({numeric[0]}), others are names ({other!r})")
    if numeric:
        top = max(numeric, key=int)
        if int(top) >= 1_000_000:
            raise UserError(f"{_first(shard_paths, split, found, top)}: the label {top} cannot be a class number")
        return list(names) or [f"class {number}" for number in range(int(top) + 1)], None
    classes = list(names) if set(used) <= set(names) else sorted(used)
    if names and len(classes) != len(names):
        strange = next(text for text in classes if text not in names)
        raise UserError(
            f"{shard_paths.title}: {NAMES} has {len(names)} classes, but not {strange!r}, which is a label of the "
            f"shards.{near(strange, names)}"
        )
    return list(names) or classes, {name: number for number, name in enumerate(classes)}


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _first(shard_paths: ShardPaths, split: str, found: listing.Found, label: str) -> str:
    number = list(found.texts["labels"]).index(label)
    image = found.columns["rows"][np.argmax(found.columns["label"] == number)]
    return f"{shard_paths.by_split[split][found.columns['shard'][image]]}:{found.texts['members'][int(image)]}"
