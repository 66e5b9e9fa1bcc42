"""Images in tar shards (WebDataset), read by a stored index: shard, byte range and label.

The sample order is a function of numbered samples, so that subsets, splits, resume and ranks work as for any other
dataset; each process reads only the bytes of its own samples.

`datasets` and `wids` cannot replace this file: both first copy every shard to the local disk, and read damaged shards
without an error (holes end them silently); `wids` also needs the sizes beforehand, and runs URLs in a shell.
"""

import os
import posixpath
import re
import tarfile
import time
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from randlora_pl.data.catalog import SPLIT_OF, SPLITS, SUFFIXES, DatasetSpec
from randlora_pl.data.locations import (
    as_typed,
    expanded,
    is_url,
    listed,
    names_files,
    read_range,
    remote,
    state_of_url,
    unreadable,
    without_query,
)
from randlora_pl.data.readers import Samples, key_order, numbers_of, source_split
from randlora_pl.data.readers.trees import Listing, Stamp, Watch, read_listing, stamp
from randlora_pl.data.sources import EncodedImages, Ints, Strings
from randlora_pl.data.validate import check_templates
from randlora_pl.utils.errors import UserError, errors_in, log, near
from randlora_pl.utils.files import open_plain, parse_json

EXPECTED = "expected a folder of .tar files, a pattern such as train-{000..099}.tar, or a text file that lists them"
NAMES = "classnames.txt"
_READERS = 8


class Sample(NamedTuple):
    """Image in a tar file: its member name, first byte and number of bytes, and its class number or name."""

    member: str
    offset: int
    length: int
    label: str


class _Member(NamedTuple):
    name: str
    offset: int
    length: int
    content: bytes = b""


def scan(shard: str) -> tuple[list[Sample], str]:
    """Return the samples of a tar file in file order, and a warning or "".

    Files with the same name up to the first dot of the last part are one sample, as in WebDataset.

    Raises:
        UserError: The file is missing, compressed or damaged, or a sample is incomplete or repeated.
    """
    groups: dict[str, dict[str, _Member]] = defaultdict(dict)
    try:
        if is_url(shard):
            system, path = remote(shard)
            stream = system.open(path, "rb", block_size=2**22, cache_type="readahead")
        else:
            stream = open_plain(shard)
        with stream:
            for member in _members(shard, stream):
                folder, base = posixpath.split(member.name)
                stem, _, suffix = base.partition(".")
                if not stem or folder.startswith("__"):  # hidden files; __MACOSX
                    continue
                group, suffix = groups[posixpath.join(folder, stem)], suffix.lower()
                if suffix in group:
                    where = f"the second is at byte {member.offset:,}"
                    raise UserError(f"{shard}: the member {member.name!r} is repeated, {where}")
                if suffix in ("cls", "json") and member.length <= 2**20:
                    stream.seek(member.offset)
                    member = member._replace(content=stream.read(member.length))
                group[suffix] = member
            remark = _ending(shard, stream)
    except UserError:
        raise
    except Exception as error:  # remote file systems raise many types
        raise unreadable(shard, error) from error
    samples = [_sample(shard, key, members) for key, members in groups.items()]
    return sorted(samples, key=lambda sample: sample.offset), remark


def compressed(shard: str) -> UserError:
    """Return the error for a compressed tar file."""
    return UserError(f"{shard} is compressed, so its members cannot be read individually. Uncompress it first")


def _members(shard: str, stream: IO[bytes]) -> Iterator[_Member]:
    """Yield the regular files in a tar file; the stream then is at the end mark."""
    if stream.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise compressed(shard)
    stream.seek(0)
    last = ""
    begin = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise all are kept in memory
                last, begin = info.name, info.offset
                if info.size < 0:  # Python before 3.11.14 would read the same members forever
                    raise UserError(f"The shard {shard} is damaged at byte {begin:,}. Copy or write it again")
                if info.issparse():
                    raise UserError(
                        f"{shard}: the member {last!r} is sparse, so it is not contiguous. Write the shard "
                        "without tar's option --sparse"
                    )
                if info.isreg():
                    yield _Member(info.name.removeprefix("./"), info.offset_data, info.size)
            end = tar.offset
    except tarfile.ReadError as error:
        if last:
            where = f"within the member {last!r} that begins at byte {begin:,}"
            raise UserError(f"The shard {shard} is cut off {where} ({error}). Copy or write it again") from error
        raise UserError(f"{shard} is not a tar file ({error})") from error
    stream.seek(end)


def _ending(shard: str, stream: IO[bytes]) -> str:
    """Return a warning about the end of the file, or "".

    The rest must be zeros: tarfile takes the first block of zeros as the end, but it may be a hole in an incomplete
    copy, or the end of the first of several concatenated files.
    """
    where = stream.tell()
    mark = stream.read(tarfile.BLOCKSIZE)
    if mark.strip(b"\0"):
        raise UserError(f"The shard {shard} is damaged at byte {where:,}. Copy or write it again")
    zeros = len(mark)
    while rest := stream.read(2**18):
        something = rest.lstrip(b"\0")
        zeros += len(rest) - len(something)
        if something:
            raise UserError(
                f"The shard {shard} has an end mark at byte {where:,}, but more data at byte {where + zeros:,}: it is "
                "damaged, or several files were concatenated (use tar -A)"
            )
    if zeros > 2**20:  # tar pads to 10,240 bytes, or as set by -b
        return f"{shard} has only zeros after byte {where:,}, {zeros:,} of them. Check that the copy is complete"
    return "" if mark else f"{shard} has no end mark: it may have been cut off at byte {where:,}"


def _sample(shard: str, key: str, members: dict[str, _Member]) -> Sample:
    images = [member for suffix, member in members.items() if f".{suffix}" in SUFFIXES]
    names = ", ".join(member.name for member in members.values())
    if len(images) != 1:
        what = "no image" if not images else f"{len(images)} images"
        raise UserError(f"{shard}: the sample {key!r} has {what}; its members are {names}")
    if "cls" in members:
        label = members["cls"].content.decode("utf-8-sig", "replace").strip()
        if not label:
            raise UserError(f"{shard}: {members['cls'].name} has no class number or name")
    elif "json" in members:
        where = f"{shard}: {members['json'].name}"
        try:
            loaded = parse_json(members["json"].content)
        except ValueError as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        value = loaded.get("label", loaded.get("cls")) if isinstance(loaded, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise UserError(f"{where} has no class; expected 'label' or 'cls' with a whole number or a name")
        label = str(value).strip()
    else:
        what, more = f"no label, its members are {names}", ""
        if "txt" in members:
            what = f"a caption ({members['txt'].name}), but captions are not classes"
            more = "; for captions: --data.dataset pairs"
        expected = f"Expected {key}.cls, or {key}.json with 'label'{more}"
        raise UserError(f"{shard}: the sample {key!r} has {what}. {expected}")
    return Sample(*images[0][:3], label)


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
        """Return the lines of the first existing file of ``names`` next to the shards, or []."""
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
        locations = [str(path) for path in files if path.suffix == ".tar"]
        locations = locations or [str(path) for path in files if re.search(packed, path.name)]  # an error below
        if not locations:
            raise UserError(f"{root} has no .tar files; {EXPECTED}")
    elif root.is_file() and root.suffix != ".tar":
        locations, beside = listed(root), root.parent
    elif root.is_file() or names_files(title):
        locations = [str(root)] if root.is_file() else expanded(title)
        beside = None if is_url(locations[0]) else Path(locations[0]).parent
    else:
        raise UserError(f"{root} does not exist; {EXPECTED}. Set it with --data.root")
    for location in locations:
        if re.search(packed, without_query(location)):
            raise compressed(location)
        if not is_url(location) and not Path(location).is_file():
            where = f"{len(locations):,} are listed by {title}"
            raise UserError(f"The shard {location} does not exist or is not a file ({where})")
    if twice := len(locations) - len(set(locations)):
        raise UserError(f"{title} lists {twice:,} shards more than once")
    by_split: dict[str, list[str]] = defaultdict(list)
    names = {location: PurePosixPath(without_query(location)) for location in locations}
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


def index(shard_paths: ShardPaths, split: str) -> Listing:
    """Return the index of a split; build it if it is not stored.

    By image, in the order of the shards: the columns ``shard``, ``offset`` and ``length``, the text ``members``, and
    ``keys`` if they differ. By sample: the columns ``rows``, ``label`` (index in the text ``labels``) and ``numbers``.
    """
    paths = shard_paths.by_split[split]

    def make(watch: Watch) -> Listing:
        watch(*paths)
        return _index(shard_paths, paths, by_key=split == "train")

    def states(paths: Sequence[str]) -> list[Stamp]:
        with ThreadPoolExecutor(_READERS) as threads:
            return list(threads.map(lambda path: state_of_url(path) if is_url(path) else stamp(path), paths))

    title, *absolute = (
        path if is_url(path) else os.path.abspath(path)  # noqa: PTH100 (links stay)
        for path in (shard_paths.title, *paths)
    )
    return read_listing(("webdataset", title, split), absolute, make, states, least=1)


def _index(shard_paths: ShardPaths, paths: Sequence[str], by_key: bool) -> Listing:
    columns = {name: array("q") for name in ("shard", "offset", "length", "label")}
    labels: dict[str, int] = {}
    remarks: list[str] = []

    def members() -> Iterator[str]:
        logged = time.monotonic()
        starts = range(0, len(paths), 4 * _READERS)  # else what is read early would wait in memory
        shards = (each for start in starts for each in threads.map(scan, paths[start : start + 4 * _READERS]))
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
        keys = texts = Strings.from_texts(members())
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
        keys = Strings.from_texts(first)
        numbers = numbers_of(keys)
    rows = key_order(keys) if by_key else np.arange(len(keys))
    arrays = {name: np.frombuffer(column, np.int64) for name, column in columns.items()}
    arrays |= {"rows": rows, "label": arrays["label"][rows], "numbers": numbers[rows]}
    held = {"members": texts, "labels": Strings.from_texts(labels)} | ({} if keys is texts else {"keys": keys})
    more = f" (and {len(remarks) - 1} more shards)" if len(remarks) > 1 else ""
    return Listing(arrays, held, (remarks[0] + more,) if remarks else ())


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
    shard: Ints
    offset: Ints
    length: Ints
    members: Strings

    def __len__(self) -> int:
        return len(self.shard)

    def stored(self, index: int) -> tuple[str, bytes]:
        """Return the name of image ``index``, and its bytes in the shard, which must be readable."""
        shard = self.shards[self.shard[index]]
        return self.name(index), read_range(shard, int(self.offset[index]), int(self.length[index]))

    def name(self, index: int) -> str:
        """Return ``SHARD:MEMBER``."""
        return f"{self.shards[self.shard[index]]}:{self.members[index]}"


def shards(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read the samples of one split.

    Splits are sub-folders (``train/``, ``val/``, ``test/``) or words in the names of the shards (``val-000.tar``).
    Labels are numbers or names; class names are in ``classnames.txt`` next to the shards, or are the sorted labels. A
    sample's key is the member name of its image, so that it does not depend on the location or split of the shards;
    if several shards use a name, the shard's name is prepended. Training samples are in the order of their keys,
    others in the order of the shards for sequential reading.

    Raises:
        UserError: Shards are missing or damaged, or labels are wrong.
    """
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
    listing = index(shard_paths, own)
    of_classes = listing if class_split == own else index(shard_paths, class_split)
    classes, by_name = _classes(shard_paths, class_split, of_classes, names)
    used = []
    for text in listing.texts["labels"]:
        label = _number(text) if by_name is None else by_name.get(text)
        if label is None or not 0 <= label < len(classes):
            least = f"a number from 0 to {len(classes) - 1}" if by_name is None else "a class of the train shards"
            hint = near(text, by_name or ())
            raise UserError(f"{_first(shard_paths, own, listing, text)}: the label {text!r} is not {least}.{hint}")
        used.append(label)
    labels = np.asarray(used, dtype=np.int64)[listing.columns["label"]]
    for note in listing.notes:
        log.warning("%s", note)
    shard, offset, length = (listing.columns[name] for name in ("shard", "offset", "length"))
    images = ShardImages(there[own], shard, offset, length, listing.texts["members"])
    rows = listing.columns["rows"]
    keys = listing.texts.get("keys", listing.texts["members"]).take(rows)
    prompts = tuple(template.replace("{c}", "{}") for template in templates)  # {c}: as in clip-benchmark's files
    with errors_in(shard_paths.beside):
        check_templates(prompts or None, captions=False)
    numbers = listing.columns["numbers"]
    return Samples(images, rows, labels, keys, tuple(classes), templates=prompts, known_numbers=numbers)


def _classes(
    shard_paths: ShardPaths, split: str, listing: Listing, names: Sequence[str]
) -> tuple[list[str], dict[str, int] | None]:
    """Return (class names, label of each name used by the shards, or None if they use numbers)."""
    used = list(listing.texts["labels"])
    numeric = [text for text in used if _number(text) is not None]
    if numeric and len(numeric) < len(used):
        other = next(text for text in used if _number(text) is None)
        raise UserError(f"{shard_paths.title}: some labels are numbers ({numeric[0]}), others are names ({other!r})")
    if numeric:
        top = max(numeric, key=int)
        if int(top) >= 1_000_000:
            raise UserError(f"{_first(shard_paths, split, listing, top)}: the label {top} cannot be a class number")
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


def _first(shard_paths: ShardPaths, split: str, listing: Listing, label: str) -> str:
    number = list(listing.texts["labels"]).index(label)
    image = listing.columns["rows"][np.argmax(listing.columns["label"] == number)]
    return f"{shard_paths.by_split[split][listing.columns['shard'][image]]}:{listing.texts['members'][int(image)]}"
