"""Data sets whose folders are the classes; the splits are folders, an index in the package, or left to be drawn.

Caltech 101 and 256 have no split of their own. Theirs is `randlora_pl.data.splits`' draw, which depends on nothing
but the file names and how many there are of each class: everyone with the complete data set has the same one.
EuroSAT's is written down in ``indices/eurosat.json``, because the paper's 270 images of each class are not in
proportion to the size of the classes.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from randlora_pl.data.formats.common import file_samples
from randlora_pl.data.images import SUFFIXES
from randlora_pl.data.readers import Samples, missing
from randlora_pl.data.row import Row
from randlora_pl.errors import UserError, near

INDICES = Path(__file__).parents[1] / "indices"


def class_tree(
    row: Row,
    root: Path,
    split: str,
    *,
    download: bool,
    folders: Mapping[str, str],
    known: Sequence[str] | None = None,
    strip: str = "",
    ignore: Sequence[str] = (),
    suffixes: Sequence[str] = (),
) -> Samples | None:
    """Images in class folders, the class folders of each split below a folder of its own.

    Args:
        row: The data set.
        root: Folder that holds the data sets.
        split: ``train``, ``val`` or ``test``.
        download: Unused: these are fetched by hand.
        folders: Folder of each split below the root; a split that is left out is not there.
        known: Names of the class folders by label; None: the sorted folders, as many as the row has classes.
        strip: Regular expression of what a folder's name has and its class name, where the row has none, lacks.
        ignore: Folders that are no classes.
        suffixes: Suffixes of the images, in lower case; by default all that are known.

    Raises:
        UserError: Folders or images are missing.
    """
    del download
    if split not in folders:
        return None
    home = root / folders[split]
    order = _classes(row, root, home, known, ignore)
    kinds = frozenset(suffixes) or SUFFIXES
    entries = [
        (f"{folder}/{image}", label) for label, folder in enumerate(order) for image in _images(home / folder, kinds)
    ]
    names = row.classnames or [re.sub(strip, "", folder).replace("-", " ") for folder in order]
    return file_samples(row, root, home, entries, names, str(home))


def indexed_tree(
    row: Row, root: Path, split: str, *, download: bool, folder: str, known: Sequence[str], index: str
) -> Samples:
    """Images ``CLASS/CLASS_N.jpg`` whose validation and test numbers the package lists; the rest is for training.

    Args:
        row: The data set.
        root: Folder that holds the data sets.
        split: ``train``, ``val`` or ``test``.
        download: Unused: it is fetched by hand.
        folder: Folder of the class folders below the root.
        known: Names of the class folders by label.
        index: Name of the JSON file in ``indices``.

    Raises:
        UserError: Folders or images are missing, or a file has another name.
    """
    whole = class_tree(row, root, "train", download=download, folders={"train": folder}, known=known)
    assert whole is not None  # the split "train" was just named
    listed = json.loads((INDICES / f"{index}.json").read_text(encoding="utf-8"))
    split_of = {
        (name, number): part for part in ("val", "test") for name in known for number in listed[part].get(name, ())
    }
    chosen = []
    for place, key in enumerate(whole.keys):
        name = key.partition("/")[0]
        number = re.fullmatch(rf"{name}/{name}_(\d+)\.\w+", key)
        if number is None:
            raise UserError(f"{row.title}: {root / folder / key} should be called {name}_NUMBER.jpg")
        if split_of.get((name, int(number[1])), "train") == split:
            chosen.append(place)
    return whole.subset(np.asarray(chosen, dtype=np.int64))


def _classes(row: Row, root: Path, home: Path, known: Sequence[str] | None, ignore: Sequence[str]) -> Sequence[str]:
    """The class folders in ``home`` by label.

    Raises:
        UserError: There is one that is not known, or one is lacking.
    """
    try:
        with os.scandir(home) as listing:
            there = sorted(entry.name for entry in listing if entry.is_dir() and not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(row, root, f"there is no folder {home}") from error
    there = [name for name in there if name not in ignore]
    if known is None:
        if len(there) != row.classes:
            raise missing(row, root, f"{home} has {len(there)} class folders, expected are {row.classes}")
        return there
    odd = [name for name in there if name not in known]
    if odd:
        raise UserError(f"{row.title}: {home / odd[0]} is none of its {len(known)} classes.{near(odd[0], known)}")
    absent = [name for name in known if name not in there]
    if absent:
        raise missing(row, root, f"{home} lacks {len(absent)} of {len(known)} class folders, the first: {absent[0]}")
    return known


def _images(folder: Path, suffixes: frozenset[str]) -> list[str]:
    """Names of the images directly in a class folder: stray folders and files are in some of the archives."""
    names = os.listdir(folder)  # noqa: PTH208 (a million Path objects are slow)
    return [name for name in names if os.path.splitext(name)[1].lower() in suffixes and name[0] != "."]  # noqa: PTH122
