"""Datasets with class folders, and the cache of their listings; splits are folders, an index in the package, or drawn.

EuroSAT and Caltech have no published splits. EuroSAT's 270 validation and 270 test images per class and Caltech 101's
test images are listed in ``indices``. Caltech 256's file names were not available; its split is drawn by
`randlora_pl.data.splits`, which depends only on the file names and the class sizes, so that everyone with the
complete dataset gets the same split.

Listings of these folders are cached between runs, and mapped into memory that processes share. Listing, sorting and
hashing a million names takes seconds on a fast disk and minutes on a slow one. A stored listing is
valid if every listed folder still has the same times and inode: adding, removing or renaming a file changes them.
Listings of folders changed within the last seconds are not stored, because a file system with coarse times
would not show a second change; nor are listings of mounted object stores, whose folders have artificial times.
"""

import hashlib
import json
import os
import re
import stat
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from randlora_pl.data.catalog import ALIASES, SPLIT_OF, SUFFIXES, DatasetSpec, is_image
from randlora_pl.data.readers import Samples, key_order, missing, numbers_of, source_split
from randlora_pl.data.sources import FileImages, Ints, Strings
from randlora_pl.utils.errors import UserError, log, near
from randlora_pl.utils.files import atomic_file
from randlora_pl.utils.machine import cache_folder

INDICES = Path(__file__).parents[1] / "indices"

LEAST = 10_000
"""Minimum number of samples for storing a listing."""

SETTLED_NS = 2 * 10**9
"""Minimum age of a change in nanoseconds: FAT has steps of 2 s."""

Stamp = tuple[int, int, int]
"""Modification and change time in nanoseconds, and the inode of a folder or the size of a file; two zeros if unknown.

Copying tools set the modification time; the change time cannot be set.
"""

Watch = Callable[..., None]
"""Function that records the states of the paths that a listing depends on."""
_ignore_stored: ContextVar[bool] = ContextVar("ignore_stored", default=False)


def class_tree(
    row: DatasetSpec,
    root: Path,
    split: str,
    *,
    folders: Mapping[str, str],
    known: Sequence[str] | None = None,
    names: Sequence[str] = (),
    pattern: str = "(.*)",
    ignore: Sequence[str] = (),
    suffixes: Sequence[str] = (),
) -> Samples | None:
    """Read images in class folders, with one parent folder per split.

    ``folders`` has the folder of each split below the root, ``known`` the names of the class folders by label; None
    for the sorted folders, as many as there are classes. A dataset may have fewer classes than are known: ``names``
    then has the class name of each known folder. ``pattern`` is the regular expression of unknown class folders, and
    its group the class name; folders in ``ignore`` are not classes. ``suffixes`` of the images are in lower case;
    default: all known ones.
    """
    if split not in folders:
        return None
    home = root / folders[split]
    order = _classes(row, root, home, known, pattern, ignore)
    kinds = frozenset(suffixes) or SUFFIXES

    def find(watch: Watch) -> Listing:
        labels: list[int] = []
        paths: list[str] = []
        for label, folder in enumerate(order):
            watch(str(home / folder))
            names_here = sorted(os.listdir(home / folder))  # noqa: PTH208 (a million Path objects are slow)
            # not below it, and of these kinds alone: some archives have stray folders and files
            images = [name for name in names_here if name[name.rfind(".") :].lower() in kinds and name[0] != "."]
            paths += [f"{folder}/{image}" for image in images]
            labels += [label] * len(images)
        return list_tree(paths, labels)

    listing = read_listing((row.name, str(home.resolve()), split), (*order, "", *sorted(kinds)), find)
    name_of = dict(zip(known or (), names, strict=False))
    plain = [name_of.get(folder) or re.sub(f"^{pattern}$", r"\1", folder).replace("-", " ") for folder in order]
    return samples_of(listing, home, row.classnames or plain)


def indexed_tree(
    row: DatasetSpec, root: Path, split: str, *, folder: str, index: str, **options: Any
) -> Samples | None:
    """Read images ``CLASS/..._N.jpg`` by an index of numbers per split in the package; the rest is for training.

    ``folder`` has the class folders, ``index`` is the name of the JSON file in ``indices``, and ``options`` are further
    arguments of `class_tree`.
    """
    listed = json.loads((INDICES / f"{index}.json").read_text(encoding="utf-8"))
    if split != "train" and split not in listed:
        return None
    whole = class_tree(row, root, "train", folders={"train": folder}, **options)
    assert whole is not None  # the split "train" was given above
    split_of = {
        (name, number): part for part, classes in listed.items() for name in classes for number in classes[name]
    }
    chosen = []
    for position, key in enumerate(whole.keys):
        name, _, file = key.partition("/")
        number = re.fullmatch(r".*_(\d+)\.\w+", file)
        if number is None:
            raise UserError(f"{row.title}: {root / folder / key} has no number; expected {row.layout}")
        if split_of.get((name, int(number[1])), "train") == split:
            chosen.append(position)
    return whole.subset(np.asarray(chosen, dtype=np.int64))


def _classes(
    row: DatasetSpec, root: Path, home: Path, known: Sequence[str] | None, pattern: str, ignore: Sequence[str]
) -> Sequence[str]:
    try:
        with os.scandir(home) as listing:
            there = sorted(entry.name for entry in listing if entry.is_dir() and not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(row, root, f"the folder {home} does not exist") from error
    there = [name for name in there if name not in ignore]
    odd = [name for name in there if (not re.fullmatch(pattern, name) if known is None else name not in known)]
    if odd:
        raise UserError(
            f"{row.title}: {home / odd[0]} is not one of its {row.classes} classes.{near(odd[0], known or ())}"
        )
    if len(there) != row.classes:
        whole = len(known or ()) == row.classes
        absent = [name for name in known or () if whole and name not in there]
        if known is None:  # folders may be numbered from 1
            starts = {name.partition(".")[0] for name in there}
            absent = [f"{number:03d}.*" for number in range(1, (row.classes or 0) + 1) if f"{number:03d}" not in starts]
        lacking = f", {absent[0]} is missing" if absent else ""
        raise missing(row, root, f"{home} has {len(there)} of {row.classes} class folders{lacking}")
    those = set(there)
    return there if known is None else [name for name in known if name in those]


TREE = "expected {root}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE with val/ and test/ next to train/"


def folder(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read images below ``root``: splits from ``train``, ``val`` and ``test`` folders (see `source_split`), else all.

    The classes are the sorted sub-folders of the train split.

    Raises:
        UserError: The folder does not exist, has no classes, an empty class, or a class without training images.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {what}; {TREE.format(root=root)}. Set it with --data.root PATH")
    homes = _split_folders(root)
    source = source_split(split, homes, root)
    if source is None:
        return None
    home = homes[source]
    classes = list(_class_folders(homes["train"]))
    here = _class_folders(home)
    unknown = [name for name in here if name not in classes]
    if unknown:
        raise UserError(
            f"The class {unknown[0]!r} is in {home} but not in {homes['train']}.{near(unknown[0], classes)}"
            " Every class needs training images"
        )

    def find(watch: Watch) -> Listing:
        paths: list[str] = []
        labels: list[int] = []
        ignored: Counter[str] = Counter()
        for label, name in enumerate(classes):
            files: list[str] = []
            if name in here:
                files, others = image_names(here[name], watch)
                ignored += others
            if not files and split == "train":
                raise UserError(f"The class folder {home / name} has no images (.jpg, .png ...). Add some or delete it")
            paths += [f"{here[name].name}/{file}" for file in files]
            labels += [label] * len(files)
        notes = []
        if ignored:
            most, _ = ignored.most_common(1)[0]
            kind = f"mostly {most}" if len(ignored) > 1 else most
            left_out = f"{ignored.total()} files in {home} are not images of a known type and are ignored"
            notes.append(f"{left_out} ({kind})")
        return list_tree(paths, labels, [unicodedata.normalize("NFC", path) for path in paths], notes)

    there = [path.name for path in here.values()]
    found_here = read_listing(("folder", str(home.resolve()), split), (*classes, "", *there, str(home)), find)
    return samples_of(found_here, home, classes)


def _split_folders(root: Path) -> dict[str, Path]:
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    there = {split: [folders[name] for name in names if name in folders] for split, names in ALIASES.items()}
    by_split = {split: homes[0] for split, homes in there.items() if homes}
    if "train" not in by_split or not _sub_folders(by_split["train"]):
        # folders named after splits without a proper layout would be trained on as classes
        if len(by_split) > 1 and len(by_split) == len(folders):
            unlabelled = by_split.get("train", root)
            raise UserError(
                f"{unlabelled} has no class folders, so its images have no labels; {TREE.format(root=root)}"
            )
        for split in ("val", "test"):
            if split in by_split and _sub_folders(by_split[split]):
                lacking = root / "train"
                what = f"{by_split[split]} has class folders, but {lacking} does not exist"
                raise UserError(f"{what}. Put the other classes into {lacking}")
        return {"train": root}  # a class may be named "train"
    return by_split


def _sub_folders(home: Path) -> dict[str, Path]:
    there = [path for path in home.iterdir() if path.is_dir() and not path.name.startswith(".")]
    # composed letters: file systems store accents differently
    return dict(sorted((unicodedata.normalize("NFC", path.name), path) for path in there))


def _class_folders(home: Path) -> dict[str, Path]:
    """Return the class folders in ``home`` by name, sorted; refuse none, and a single one that itself has several."""
    folders = _sub_folders(home)
    if not folders:
        loose = " (there are images in it, but a class is a sub-folder)" if any(map(is_image, home.iterdir())) else ""
        is_split = home.name.lower() in SPLIT_OF
        list_tree = f"expected {home}/CLASS/IMAGE" if is_split else TREE.format(root=home)
        raise UserError(f"The data folder {home} has no class folders{loose}; {list_tree}")
    if len(folders) == 1 and len(_sub_folders(only := next(iter(folders.values())))) > 1:
        raise UserError(f"The data folder {home} has only the folder {only.name}. Did you mean --data.root {only}?")
    return folders


def image_names(home: Path, watch: Watch = lambda folder: None) -> tuple[list[str], Counter[str]]:
    """Return all image files below ``home``, without hidden files; links to folders are followed once.

    Args:
        home: Folder to search.
        watch: Called with each folder before it is listed.

    Returns:
        Paths relative to ``home`` with forward slashes, and how often each suffix of other files was found.

    Raises:
        UserError: A folder cannot be listed; its images would be left out silently.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # deleted while it was listed
            reason = f"The folder {error.filename} cannot be listed: {error.strerror}"
            raise UserError(f"{reason}. Make it readable, or move it")

    files: list[str] = []
    ignored: Counter[str] = Counter()
    seen: set[str] = set()
    watch(str(home))
    for directory, folders, names in os.walk(home, onerror=refuse, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # a link to a folder above, or to a visited one
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            watch(os.path.join(directory, name))  # noqa: PTH118 (before it is listed)
        below = "" if directory == str(home) else Path(directory).relative_to(home).as_posix() + "/"
        for name in sorted(names):
            if name.startswith("."):
                continue
            if name[name.rfind(".") :].lower() in SUFFIXES:  # not by a Path: there may be a million
                files.append(below + name)
            else:
                ignored[Path(name).suffix.lower() or name] += 1
    return files, ignored


@dataclass(frozen=True)
class Listing:
    """Listing result as columns.

    Attributes:
        columns: int64 arrays by name.
        texts: Strings by name.
        notes: Warnings, repeated when the listing is reused.
    """

    columns: Mapping[str, Ints]
    texts: Mapping[str, Strings]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def timeless_devices(mounts: str = "/proc/self/mountinfo") -> set[int]:
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


def read_listing(
    name: Sequence[str],
    recipe: Sequence[str],
    find: Callable[[Watch], Listing],
    states: Callable[[Sequence[str]], Sequence[Stamp]] = lambda paths: list(map(stamp, paths)),
    least: int | None = None,
) -> Listing:
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
    listing = None if _ignore_stored.get() else _load(path, recipe, states)
    if listing is None:
        begin = time.time_ns()
        seen: dict[str, Stamp] = {}
        listing = find(lambda *paths: seen.update(zip(paths, states(paths), strict=True)))
        if len(listing) >= (LEAST if least is None else least):
            devices = timeless_devices()
            folders = filter(os.path.isdir, seen if devices else ())
            # a later change would be visible in the states
            settled = all(0 < max(state[:2]) < begin - SETTLED_NS for state in seen.values()) and not any(
                os.stat(folder).st_dev in devices  # noqa: PTH116 (as in `stamp`)
                for folder in folders
            )
            if settled:
                _save(path, recipe, listing, seen)
    return listing


def list_tree(paths: list[str], labels: list[int], keys: list[str] | None = None, notes: Sequence[str] = ()) -> Listing:
    """Return columns of image files in the order of their keys, by default their paths.

    Paths have forward slashes, and are relative to a folder.
    """
    keys = keys or paths
    order = key_order(keys)
    ordered = [keys[index] for index in order.tolist()]
    texts = {"keys": Strings.from_texts(ordered)}
    if keys != paths:
        texts["paths"] = Strings.from_texts(paths).take(order)
    columns = {"labels": np.asarray(labels, dtype=np.int64)[order], "numbers": numbers_of(ordered)}
    return Listing(columns, texts, tuple(notes))


def samples_of(listing: Listing, home: Path, classes: Sequence[str]) -> Samples:
    """Build samples from the columns of `tree` with paths below ``home``; log the notes."""
    for note in listing.notes:
        log.warning("%s", note)
    images = FileImages(listing.texts.get("paths", listing.texts["keys"]), home)
    labels = listing.columns["labels"]
    keys, numbers = listing.texts["keys"], listing.columns["numbers"]
    return Samples(images, np.arange(len(labels)), labels, keys, tuple(classes), known_numbers=numbers)


def _save(path: Path, recipe: Sequence[str], listing: Listing, seen: Mapping[str, Stamp]) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = dict(listing.columns)
    for name, text in listing.texts.items():
        arrays |= {f"{name}/{part}": array for part, array in vars(text).items() if array is not None}
    about = {"recipe": recipe, "stamps": seen, "notes": listing.notes}
    about |= {"arrays": {name: [each.dtype.str, each.nbytes, zlib.crc32(each.data)] for name, each in arrays.items()}}
    try:
        with atomic_file(path) as stream:
            stream.write(json.dumps(about).encode() + b"\n")
            for array in arrays.values():
                stream.write(bytes(-stream.tell() % array.itemsize))
                stream.write(array.data)
    except OSError as error:
        log.debug("the listing cannot be stored in %s: %s", path, error)


def _load(path: Path, recipe: Sequence[str], states: Callable[[Sequence[str]], Sequence[Stamp]]) -> Listing | None:
    """Map a stored listing, or return None if it is missing, damaged or outdated."""
    try:
        with path.open("rb") as stream:
            about = json.loads(stream.readline())
            place, content = stream.tell(), np.memmap(stream, np.uint8, "c")
        if about["recipe"] != list(recipe):
            return None
        if list(about["stamps"].values()) != list(map(list, states(list(about["stamps"])))):
            return None
        columns: dict[str, Ints] = {}
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
        return Listing(columns, {name: Strings(**parts) for name, parts in texts.items()}, tuple(about["notes"]))
    except Exception as error:  # no file, or a damaged one, which raises many types; the folder is listed again
        log.debug("the stored listing %s cannot be used: %s", path, error)
        return None
