"""CoOp's splits: a JSON file beside the images with ``[path, label, class name]`` of each image, by split."""

from itertools import combinations
from pathlib import Path, PureWindowsPath
from typing import Any

from randlora_pl.data.catalog.coop import COPY, PAGE
from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.readers.common import file_samples
from randlora_pl.data.readers.dispatch import SPLITS, Samples, missing
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.plain_files import read_plain

LARGEST = 1 << 26
"""Maximum size of a split file in bytes: the 101,000 images of Food-101 take about a tenth."""

Entry = tuple[str, int, str]


def split_file(
    row: DatasetSpec, root: Path, split: str, *, file: str, images: str, underscores: bool = False
) -> Samples:
    """Read a dataset by its split file.

    ``file`` and ``images`` are the split file and the folder of the images, below the root. Underscores of class
    names become spaces, unless ``underscores`` is set.
    """
    path = root / file
    try:
        parts = _parts(parse_json(read_plain(path, LARGEST)))
        names = _names(parts)
    except FileNotFoundError as error:
        raise _refused(row, root, path, "does not exist") from error
    except (OSError, ValueError) as error:
        raise _refused(row, root, path, f"cannot be read ({error})") from error
    classes = names if underscores else [name.replace("_", " ") for name in names]
    entries = [(image, label) for image, label, _ in parts[split]]
    return file_samples(row, root, root / images, entries, classes, f"the {split} part of {path}")


def _refused(row: DatasetSpec, root: Path, path: Path, why: str) -> UserError:
    """Return the error for a missing or damaged split file, with its source."""
    if row.files:  # `data get` explains how to get the split file as well
        return missing(row, root, f"{path} {why}")
    return UserError(f"{row.title}: CoOp's split file {path} {why}. Get it by the link in {PAGE}, or from {COPY}.")


def _parts(content: Any) -> dict[str, list[Entry]]:
    """Return the checked entries of each split.

    Raises:
        ValueError: The content is something else, or a path leaves the folder of the images.
    """
    if not isinstance(content, dict) or any(not isinstance(content.get(split), list) for split in SPLITS):
        raise ValueError(f"it does not have the lists {', '.join(SPLITS)}")
    parts = {split: [_entry(split, n, entry) for n, entry in enumerate(content[split], 1)] for split in SPLITS}
    images = {split: {image for image, _, _ in entries} for split, entries in parts.items()}
    for first, second in combinations(SPLITS, 2):
        if both := images[first] & images[second]:
            raise ValueError(f"{brief(min(both))} is in {first} and in {second}")
    return parts


def _entry(split: str, number: int, entry: Any) -> Entry:
    where = f"{split} entry {number}, {brief(entry)}"
    match entry:
        case [str(image), int(label), str(name)] if not isinstance(label, bool) and name.strip():
            place = PureWindowsPath(image)  # it splits at both kinds of slashes
            if place.anchor or ".." in place.parts or not place.parts or "\0" in image:
                raise ValueError(f"{where}: the path leaves the folder of the images")
            (image + name).encode("utf-8")  # an escape in JSON may be half a character: a ValueError
            return image, label, name
    raise ValueError(f"{where}: it is not of the form [path, label, class name]")


def _names(parts: dict[str, list[Entry]]) -> list[str]:
    """Return the class names by label.

    Raises:
        ValueError: The labels are not 0, 1, 2 ... without gaps, or a label has two names.
    """
    names: dict[int, str] = {}
    for entries in parts.values():
        for _, label, name in entries:
            if names.setdefault(label, name) != name:
                raise ValueError(f"label {label} is called {brief(names[label])} and {brief(name)}")
    gap = next((label for label, found in enumerate(sorted(names)) if label != found), None)
    if gap is not None:
        raise ValueError(f"its {len(names)} labels should be 0 to {len(names) - 1}, but label {gap} is missing")
    return [names[label] for label in sorted(names)]
