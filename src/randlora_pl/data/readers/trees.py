"""Datasets with class folders, also a user's own; splits are folders, an index in the package, or drawn.

EuroSAT and Caltech have no published splits. EuroSAT's 270 validation and 270 test images per class and Caltech 101's
test images are listed in ``indices``. Caltech 256's file names were not available; its split is drawn by
`randlora_pl.data.splits`, which depends only on the file names and the class sizes, so that everyone with the
complete dataset gets the same split.
"""

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.readers import listing_cache as listing
from randlora_pl.data.readers.dispatch import ALIASES, SPLIT_OF, Samples, missing, source_split
from randlora_pl.data.sources import SUFFIXES, is_image
from randlora_pl.utils.errors import UserError, near

INDICES = Path(__file__).parents[1] / "indices"


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

    def find(watch: listing.Watch) -> listing.Found:
        labels: list[int] = []
        paths: list[str] = []
        for label, folder in enumerate(order):
            watch(str(home / folder))
            names_here = sorted(os.listdir(home / folder))  # noqa: PTH208 (a million Path objects are slow)
            # not below it, and of these kinds alone: some archives have stray folders and files
            images = [name for name in names_here if name[name.rfind(".") :].lower() in kinds and name[0] != "."]
            paths += [f"{folder}/{image}" for image in images]
            labels += [label] * len(images)
        return listing.tree(paths, labels)

    found = listing.stored((row.name, str(home.resolve()), split), (*order, "", *sorted(kinds)), find)
    name_of = dict(zip(known or (), names, strict=False))
    plain = [name_of.get(folder) or re.sub(f"^{pattern}$", r"\1", folder).replace("-", " ") for folder in order]
    return listing.samples_of(found, home, row.classnames or plain)


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


TREE = "expected {root}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE with val/ and test/ beside train/"


def folder(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read images below ``root``: splits from ``train``, ``val`` and ``test`` folders (see `source_split`), else all.

    The classes are the sorted sub-folders of the train split.

    Raises:
        UserError: The folder does not exist, has no classes, an empty class, or a class without training images.
    """
    del row
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {what}; {TREE.format(root=root)}. Set it with --data.root PATH")
    homes = _split_folders(root)
    source = source_split(split, homes, root)
    if source is None:
        return None
    home = homes[source]
    classes = list(class_folders(homes["train"]))
    here = class_folders(home)
    unknown = [name for name in here if name not in classes]
    if unknown:
        raise UserError(
            f"The class {unknown[0]!r} is in {home} but not in {homes['train']}.{near(unknown[0], classes)}"
            " Every class needs training images"
        )

    def find(watch: listing.Watch) -> listing.Found:
        paths: list[str] = []
        labels: list[int] = []
        ignored: Counter[str] = Counter()
        for label, name in enumerate(classes):
            files = image_names(here[name], ignored, watch) if name in here else []
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
        return listing.tree(paths, labels, [unicodedata.normalize("NFC", path) for path in paths], notes)

    there = [path.name for path in here.values()]
    found_here = listing.stored(("folder", str(home.resolve()), split), (*classes, "", *there, str(home)), find)
    return listing.samples_of(found_here, home, classes)


def _split_folders(root: Path) -> dict[str, Path]:
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    there = {split: [folders[name] for name in names if name in folders] for split, names in ALIASES.items()}
    found = {split: homes[0] for split, homes in there.items() if homes}
    if "train" not in found or not _sub_folders(found["train"]):
        # folders named after splits without a proper layout would be trained on as classes
        if len(found) > 1 and len(found) == len(folders):
            unlabelled = found.get("train", root)
            raise UserError(
                f"{unlabelled} has no class folders, so its images have no labels; {TREE.format(root=root)}"
            )
        for split in ("val", "test"):
            if split in found and _sub_folders(found[split]):
                lacking = root / "train"
                what = f"{found[split]} has class folders, but {lacking} does not exist"
                raise UserError(f"{what}. Put the other classes into {lacking}")
        return {"train": root}  # a class may be named "train"
    return found


def _sub_folders(home: Path) -> dict[str, Path]:
    there = [path for path in home.iterdir() if path.is_dir() and not path.name.startswith(".")]
    # composed letters: file systems store accents differently
    return dict(sorted((unicodedata.normalize("NFC", path.name), path) for path in there))


def class_folders(home: Path) -> dict[str, Path]:
    """Return the class folders in ``home`` by name, sorted; refuse none, and a single one that itself has several."""
    folders = _sub_folders(home)
    if not folders:
        loose = " (there are images in it, but a class is a sub-folder)" if any(map(is_image, home.iterdir())) else ""
        is_split = home.name.lower() in SPLIT_OF
        tree = f"expected {home}/CLASS/IMAGE" if is_split else TREE.format(root=home)
        raise UserError(f"The data folder {home} has no class folders{loose}; {tree}")
    if len(folders) == 1 and len(_sub_folders(only := next(iter(folders.values())))) > 1:
        raise UserError(f"The data folder {home} has only the folder {only.name}. Did you mean --data.root {only}?")
    return folders


def image_names(home: Path, ignored: Counter[str], watch: Callable[[str], object]) -> list[str]:
    """Return all image files below ``home``, without hidden files; links to folders are followed once.

    Args:
        home: Folder to search.
        ignored: Receives the suffixes of other files.
        watch: Called with each folder before it is listed.

    Returns:
        Paths relative to ``home`` with forward slashes.

    Raises:
        UserError: A folder cannot be listed; its images would be left out silently.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # deleted while it was listed
            reason = f"The folder {error.filename} cannot be listed: {error.strerror}"
            raise UserError(f"{reason}. Make it readable, or move it")

    files: list[str] = []
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
    return files
