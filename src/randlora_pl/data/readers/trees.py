"""Data sets whose folders are the classes; the splits are folders, an index in the package, or left to be drawn.

EuroSAT and Caltech have no split of their own. EuroSAT's, 270 validation and 270 test images of each class, and the
test images of Caltech 101 are written down in ``indices``. Those of Caltech 256, whose file names were not at hand,
are the draw of `randlora_pl.data.sampling.splits`, which depends on nothing but the file names and how many there are
of each class: everyone with the complete data set has the same.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from randlora_pl.data.catalog.spec import Row
from randlora_pl.data.images.decode import SUFFIXES
from randlora_pl.data.readers import listing_cache as listing
from randlora_pl.data.readers.dispatch import Samples, missing
from randlora_pl.utils.errors import UserError, near

INDICES = Path(__file__).parents[1] / "indices"


def class_tree(
    row: Row,
    root: Path,
    split: str,
    *,
    folders: Mapping[str, str],
    known: Sequence[str] | None = None,
    pattern: str = "(.*)",
    ignore: Sequence[str] = (),
    suffixes: Sequence[str] = (),
) -> Samples | None:
    """Images in class folders, the class folders of each split below a folder of its own.

    Args:
        row: The data set.
        root: Folder that holds the data sets.
        split: ``train``, ``val`` or ``test``.
        folders: Folder of each split below the root; a split that is left out is not there.
        known: Names of the class folders by label; None: the sorted folders, as many as the row has classes.
        pattern: Regular expression of the class folders where they are not known; its group is the class name.
        ignore: Folders that are no classes.
        suffixes: Suffixes of the images, in lower case; by default all that are known.

    Raises:
        UserError: Folders or images are missing.
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
            watch(home / folder)
            images = _images(home / folder, kinds)
            paths += [f"{folder}/{image}" for image in images]
            labels += [label] * len(images)
        return listing.tree(paths, labels)

    found = listing.stored((row.name, str(home.resolve()), split), (*order, "", *sorted(kinds)), find)
    names = row.classnames or [re.sub(f"^{pattern}$", r"\1", folder).replace("-", " ") for folder in order]
    return listing.samples_of(found, home, names)


def indexed_tree(row: Row, root: Path, split: str, *, folder: str, index: str, **options: Any) -> Samples | None:
    """Images ``CLASS/..._N.jpg`` of which the package lists the numbers of some splits; the rest is for training.

    Args:
        row: The data set.
        root: Folder that holds the data sets.
        split: ``train``, ``val`` or ``test``.
        folder: Folder of the class folders below the root.
        index: Name of the JSON file in ``indices``.
        options: Further arguments of `class_tree`.

    Raises:
        UserError: Folders or images are missing, or a file has another name.
    """
    listed = json.loads((INDICES / f"{index}.json").read_text(encoding="utf-8"))
    if split != "train" and split not in listed:
        return None
    whole = class_tree(row, root, "train", folders={"train": folder}, **options)
    assert whole is not None  # the split "train" was just named
    split_of = {
        (name, number): part for part, classes in listed.items() for name in classes for number in classes[name]
    }
    chosen = []
    for place, key in enumerate(whole.keys):
        name, _, file = key.partition("/")
        number = re.fullmatch(r".*_(\d+)\.\w+", file)
        if number is None:
            raise UserError(f"{row.title}: {root / folder / key} has no number, expected are {row.layout}")
        if split_of.get((name, int(number[1])), "train") == split:
            chosen.append(place)
    return whole.subset(np.asarray(chosen, dtype=np.int64))


def _classes(
    row: Row, root: Path, home: Path, known: Sequence[str] | None, pattern: str, ignore: Sequence[str]
) -> Sequence[str]:
    """The class folders in ``home`` by label.

    Raises:
        UserError: There is one that cannot be a class, or one is lacking.
    """
    try:
        with os.scandir(home) as listing:
            there = sorted(entry.name for entry in listing if entry.is_dir() and not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(row, root, f"there is no folder {home}") from error
    there = [name for name in there if name not in ignore]
    odd = [name for name in there if (not re.fullmatch(pattern, name) if known is None else name not in known)]
    if odd:
        raise UserError(
            f"{row.title}: {home / odd[0]} is none of its {row.classes} classes.{near(odd[0], known or ())}"
        )
    if len(there) != row.classes:
        absent = [name for name in known or () if name not in there]
        if known is None:  # folders may be numbered from 1
            starts = {name.partition(".")[0] for name in there}
            absent = [f"{number:03d}.*" for number in range(1, (row.classes or 0) + 1) if f"{number:03d}" not in starts]
        lacking = f", it lacks {absent[0]}" if absent else ""
        raise missing(row, root, f"{home} has {len(there)} of {row.classes} class folders{lacking}")
    return there if known is None else known


def _images(folder: Path, suffixes: frozenset[str]) -> list[str]:
    """Names of the images directly in a class folder: stray folders and files are in some of the archives."""
    names = sorted(os.listdir(folder))  # noqa: PTH208 (a million Path objects are slow)
    return [name for name in names if name[name.rfind(".") :].lower() in suffixes and name[0] != "."]
