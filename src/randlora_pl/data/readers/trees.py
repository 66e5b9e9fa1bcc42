"""Datasets with class folders; splits are folders, an index in the package, or drawn.

EuroSAT and Caltech have no published splits. EuroSAT's 270 validation and 270 test images per class and Caltech 101's
test images are listed in ``indices``. Caltech 256's file names were not available; its split is drawn by
`randlora_pl.data.sampling.splits`, which depends only on the file names and the class sizes, so that everyone with the
complete dataset gets the same split.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.images.decode import SUFFIXES
from randlora_pl.data.readers import listing_cache as listing
from randlora_pl.data.readers.dispatch import Samples, missing
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
            images = _images(home / folder, kinds)
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
    """Return the class folders in ``home`` by label."""
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


def _images(folder: Path, suffixes: frozenset[str]) -> list[str]:
    """Return names of images directly in a class folder: some archives have stray folders and files."""
    names = sorted(os.listdir(folder))  # noqa: PTH208 (a million Path objects are slow)
    return [name for name in names if name[name.rfind(".") :].lower() in suffixes and name[0] != "."]
