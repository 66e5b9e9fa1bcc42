"""Images in tar shards (WebDataset), read by an index that is made once: which bytes of which shard, and the label.

Draws are functions of numbered samples, so that subsets, splits, resuming and ranks work as for any other data set;
each process reads the bytes of its own draws and nothing else.
"""

import logging
import os
import re
import time
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data import listing, tars
from randlora_pl.data.folders import ALIASES
from randlora_pl.data.images import decode
from randlora_pl.data.places import expanded, is_pattern, is_url, listed, spelled
from randlora_pl.data.readers import SPLITS, Samples, numbers_of
from randlora_pl.data.row import Row
from randlora_pl.data.strings import Strings
from randlora_pl.errors import UserError, near

EXPECTED = "expected a folder of .tar files, a pattern such as train-{000..099}.tar, or a text file that lists them"
NAMES = "classnames.txt"
TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")
MOST_CLASSES = 1_000_000

_SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}
_READERS = 8
_PROGRESS_S = 10

log = logging.getLogger("randlora_pl")


@dataclass
class ShardImages:
    """Images inside tar files, decoded at each call.

    Attributes:
        shards: The files: paths or URLs.
        shard: int64 (n,), the file of each image.
        offset: int64 (n,), where its bytes begin.
        length: int64 (n,), how many they are.
        members: Its name in the file.
    """

    shards: Sequence[str]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    members: Strings
    _parts: tars.Parts = field(default_factory=tars.Parts)

    def __len__(self) -> int:
        return len(self.shard)

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Image ``index`` decoded to RGB (see `decode`).

        Raises:
            UserError: The shard cannot be read, or there is no image at this place; both are named.
        """
        shard = self.shards[self.shard[index]]
        content = self._parts.read(shard, int(self.offset[index]), int(self.length[index]))
        return decode(self.name(index), short, content)

    def name(self, index: int) -> str:
        """``SHARD:MEMBER``."""
        return f"{self.shards[self.shard[index]]}:{self.members[index]}"


def shards(row: Row, root: Path, split: str, *, download: bool) -> Samples | None:
    """The samples of one split.

    Splits are sub-folders (``train/``, ``val/``, ``test/``) or words in the names of the shards (``val-000.tar``).
    Labels are numbers or names; the names of the classes are in ``classnames.txt`` beside the shards, or are the
    labels themselves, sorted. A sample's key is the name of its image in the shard, so that it does not depend on
    where the shards lie or how they are cut; where several shards use a name, the shard's own is put before it.
    Training samples are in the order of their keys, others in that of the shards, so that reading is sequential.

    Raises:
        UserError: Shards are missing or damaged, or labels are wrong.
    """
    del row, download
    places = find(root)
    test_is_val = "test" not in places.by_split and "val" in places.by_split
    own = "val" if test_is_val and split == "test" else "" if test_is_val and split == "val" else split
    if own not in places.by_split:
        return None
    if own != split:
        log.warning("%s has no test shards: its val shards are used for testing", places.title)
    train = index(places, "train")
    found = train if own == "train" else index(places, own)
    names, templates = places.lines((NAMES,)), places.lines(TEMPLATES)
    classes, by_name = _classes(places, train, names)
    labels = _labels(places, own, found, classes, by_name)
    if split == "train":
        _complain(places, labels, classes)
    for note in found.notes:
        log.warning("%s", note)
    columns = (found.columns[name] for name in ("shard", "offset", "length"))
    images = ShardImages(places.by_split[own], *columns, found.texts["members"])
    keys = found.texts.get("keys", found.texts["members"])
    prompts = tuple(template.replace("{c}", "{}") for template in templates)  # {c}: as in clip-benchmark's files
    for template in prompts:
        if template.count("{}") != 1:
            raise UserError(f"{places.beside}: the template {template!r} must have {{}} once, where the class name goes")
    samples = Samples(images, np.arange(len(labels)), labels, keys, tuple(classes), templates=prompts)
    return samples.numbered(found.columns["numbers"])


def index_all(root: Path) -> None:
    """Makes the index of every split, for other processes to find."""
    places = find(root)
    for split in places.by_split:
        index(places, split)


def nameless(classes: Sequence[str]) -> bool:
    """Whether nothing but numbers is known of the classes."""
    return len(classes) > 0 and all(re.fullmatch(r"class \d+", name) for name in classes)


@dataclass(frozen=True)
class Places:
    """Where the shards are.

    Attributes:
        title: The root as it was typed.
        by_split: Shards of each split, paths or URLs.
        beside: Folder of the files that go with them; None where there can be none.
    """

    title: str
    by_split: dict[str, list[str]]
    beside: Path | None

    def lines(self, names: Sequence[str]) -> list[str]:
        """The lines of the first of some files that lies beside the shards; none where there is none.

        Raises:
            UserError: It cannot be read.
        """
        for path in (self.beside / name for name in names if self.beside is not None):
            if path.is_file():
                try:
                    text = path.read_text(encoding="utf-8-sig")
                except (OSError, UnicodeDecodeError) as error:
                    raise UserError(f"{path} cannot be read: {error}") from error
                return [line.strip() for line in text.splitlines() if line.strip()]
        return []


def find(root: Path) -> Places:
    """The shards that a root names.

    Raises:
        UserError: There are none, one is missing, or their splits are not to be told.
    """
    title = spelled(root)
    if root.is_dir():
        found, beside = _in_folder(root), root
    elif root.is_file() and root.suffix != ".tar":
        found, beside = listed(root), root.parent
    elif root.is_file() or is_url(title) or is_pattern(title):
        found = [str(root)] if root.is_file() else expanded(title)
        beside = None if is_url(found[0]) else Path(found[0]).parent
    else:
        raise UserError(f"{root} does not exist: {EXPECTED}. Set it with --data.root")
    for place in found:
        if re.search(r"\.(tar\.\w+|tgz)$", place):
            raise UserError(f"{place} is compressed, so that nothing in it can be read by itself: uncompress it first")
        if not is_url(place) and not Path(place).is_file():
            raise UserError(f"The shard {place} does not exist or is no file ({len(found):,} are named by {title})")
    twice = len(found) - len(set(found))
    if twice:
        raise UserError(f"{title} names {twice:,} shards more than once")
    by_split: dict[str, list[str]] = {}
    for place in found:
        by_split.setdefault(split_of(place), []).append(place)
    if by_split.keys() == {""}:
        return Places(title, {"train": by_split[""]}, beside)
    if "" in by_split:
        raise UserError(
            f"{by_split[''][0]} says no split, other shards of {title} do: call it train-..., val-... or test-..."
        )
    if "train" not in by_split:
        raise UserError(
            f"{title} has no train shards, only {', '.join(by_split)}: call them train-..., or put them into train/"
        )
    return Places(title, {split: by_split[split] for split in SPLITS if split in by_split}, beside)


def _in_folder(root: Path) -> list[str]:
    """The .tar files in a folder and in those of its sub-folders that are named after splits."""
    parts = [root, *sorted(path for path in root.iterdir() if path.is_dir() and path.name.lower() in _SPLIT_OF)]
    files = sorted(
        path for part in parts for path in part.iterdir() if not path.name.startswith(".") and path.is_file()
    )
    tar = [str(path) for path in files if path.suffix == ".tar"]
    if not tar:
        packed = [path for path in files if re.search(r"\.(tar\.\w+|tgz)$", path.name)]
        if packed:
            return [str(packed[0])]
        raise UserError(f"{root} holds no .tar files: {EXPECTED}")
    return tar


def split_of(shard: str) -> str:
    """The split that a shard's name or its folder's says; empty where neither does."""
    path = PurePosixPath(shard.replace("\\", "/"))
    for word in (*re.findall("[a-z]+", path.stem.lower()), path.parent.name.lower()):
        if word in _SPLIT_OF:
            return _SPLIT_OF[word]
    return ""


def index(places: Places, split: str) -> listing.Found:
    """The index of a split, made if it is not stored.

    Columns ``shard``, ``offset``, ``length``, ``label`` (a number in the text ``labels``) and ``numbers``; texts
    ``members``, ``labels``, and ``keys`` where they are not the members.

    Raises:
        UserError: A shard cannot be indexed, or samples of two have the same key.
    """
    paths = places.by_split[split]

    def make(watch: listing.Watch) -> listing.Found:
        for path, state in zip(paths, _states(paths), strict=True):
            if is_url(path):
                watch.add(path, state)
            else:
                watch(path)
        return _index(places, paths, by_key=split == "train")

    absolute = [path if is_url(path) else os.path.abspath(path) for path in paths]  # noqa: PTH100 (links stay)
    return listing.stored(("webdataset", places.title, split), absolute, make, _states, least=1)


def _states(paths: Sequence[str]) -> list[tuple[int, int, int]]:
    with ThreadPoolExecutor(_READERS) as threads:
        return list(threads.map(lambda path: tars.state(path) if is_url(path) else listing.stamp(path), paths))


def _index(places: Places, paths: Sequence[str], by_key: bool) -> listing.Found:
    members: list[str] = []
    shard: list[int] = []
    offset: list[int] = []
    length: list[int] = []
    label: list[int] = []
    numbers: dict[str, int] = {}
    remarks: list[str] = []
    told = time.monotonic()
    with ThreadPoolExecutor(_READERS) as threads:
        for number, (samples, remark) in enumerate(threads.map(tars.scan, paths)):
            remarks += [remark] if remark else []
            for sample in samples:
                members.append(sample.member)
                shard.append(number)
                offset.append(sample.offset)
                length.append(sample.length)
                label.append(numbers.setdefault(unicodedata.normalize("NFC", sample.label), len(numbers)))
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                log.info("%s: looked into %s of %s shards", places.title, f"{number + 1:,}", f"{len(paths):,}")
    if not members:
        raise UserError(f"The shards of {places.title} hold no samples, the first is {paths[0]}")
    keys = _keys(members, shard, paths)
    order = np.asarray(sorted(range(len(keys)), key=keys.__getitem__) if by_key else range(len(keys)), dtype=np.int64)
    ordered = [keys[place] for place in order.tolist()]
    columns = {
        name: np.asarray(column, dtype=np.int64)[order]
        for name, column in (("shard", shard), ("offset", offset), ("length", length), ("label", label))
    }
    texts = {"members": Strings.of([members[place] for place in order.tolist()]), "labels": Strings.of(list(numbers))}
    if keys is not members:
        texts["keys"] = Strings.of(ordered)
    more = f" (and {len(remarks) - 1} more shards)" if len(remarks) > 1 else ""
    notes = (remarks[0] + more,) if remarks else ()
    return listing.Found(columns | {"numbers": numbers_of(ordered)}, texts, notes)


def _keys(members: list[str], shard: list[int], paths: Sequence[str]) -> list[str]:
    """The key of each sample (see `shards`).

    Raises:
        UserError: Two samples cannot be told apart.
    """
    seen: set[str] = set()
    shared = {name for name in members if name in seen or seen.add(name)}  # type: ignore[func-returns-value]
    if not shared and "".join(members).isascii():
        return members
    stems = [PurePosixPath(path.replace("\\", "/")).stem for path in paths]
    keys = [f"{stems[part]}/{name}" if name in shared else name for name, part in zip(members, shard, strict=True)]
    keys = [unicodedata.normalize("NFC", key) for key in keys]
    first: dict[str, int] = {}
    for key, part in zip(keys, shard, strict=True):
        if key in first:
            raise UserError(f"{paths[first[key]]} and {paths[part]} both hold {key!r}: give the shards different names")
        first[key] = part
    return keys


def _classes(places: Places, train: listing.Found, names: Sequence[str]) -> tuple[list[str], dict[str, int] | None]:
    """(class names, label of each name that the shards use; None where they use numbers).

    Raises:
        UserError: The labels of the train split are not of one kind, or not those of ``classnames.txt``.
    """
    said = list(train.texts["labels"])
    numeric = [text for text in said if _number(text) is not None]
    if numeric and len(numeric) < len(said):
        other = next(text for text in said if _number(text) is None)
        raise UserError(f"{places.title}: some labels are numbers ({numeric[0]}), others are names ({other!r})")
    if numeric:
        top = max(map(int, numeric))
        if top >= MOST_CLASSES:
            raise UserError(f"{_first(places, 'train', train, str(top))}: the label {top} cannot be a class number")
        return list(names) or [f"class {number}" for number in range(top + 1)], None
    classes = list(names) if set(said) <= set(names) else sorted(said)
    if names and len(classes) != len(names):
        strange = next(text for text in classes if text not in names)
        raise UserError(
            f"{places.title}: {NAMES} names {len(names)} classes, but not {strange!r}, which is a label of the "
            f"shards.{near(strange, names)}"
        )
    return list(names) or classes, {name: number for number, name in enumerate(classes)}


def _labels(
    places: Places, split: str, found: listing.Found, classes: Sequence[str], by_name: dict[str, int] | None
) -> NDArray[np.int64]:
    """The label of each sample.

    Raises:
        UserError: One is none of the classes; the shard and the image are named.
    """
    labels = []
    for text in found.texts["labels"]:
        label = _number(text) if by_name is None else by_name.get(text)
        if label is None or not 0 <= label < len(classes):
            least = f"a number from 0 to {len(classes) - 1}" if by_name is None else "a class of the train shards"
            hint = near(text, by_name or ())
            raise UserError(f"{_first(places, split, found, text)}: the label {text!r} is not {least}.{hint}")
        labels.append(label)
    return np.asarray(labels, dtype=np.int64)[found.columns["label"]]


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _first(places: Places, split: str, found: listing.Found, label: str) -> str:
    """The first image with a label, for messages."""
    number = list(found.texts["labels"]).index(label)
    place = int(np.argmax(found.columns["label"] == number))
    return f"{places.by_split[split][found.columns['shard'][place]]}:{found.texts['members'][place]}"


def _complain(places: Places, labels: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Warns where classes have no training images, as where some of the shards are not there."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        log.warning(
            "%s: %d of %d classes have no training images, the first: %r (label %d)",
            places.title, len(empty), len(classes), classes[empty[0]], empty[0],
        )  # fmt: skip
