"""Images with captions from a CSV file; the label of a line is the number of its caption."""

import csv
import posixpath
from pathlib import Path

import numpy as np

from randlora_pl.data.folders import ALIASES
from randlora_pl.data.images import FileImages
from randlora_pl.data.readers import Samples, numbers_of
from randlora_pl.data.row import Row
from randlora_pl.errors import UserError, near

COLUMNS = ("image", "caption", "split")
_SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}


def pairs(row: Row, root: Path, split: str, *, download: bool) -> Samples | None:
    """The lines of one split of a CSV file with the columns ``image,caption[,split]``.

    Image paths are relative to the file. Captions are numbered in sorted order over the whole file, so that all
    splits share the numbers. Lines of one image are a group: a seeded split keeps them together.

    Raises:
        UserError: The file or an image is missing, or a line is wrong; lines are numbered from 1.
    """
    del row, download
    lines = _lines(root)
    captions = sorted({caption for _, caption, _ in lines})
    number = {caption: place for place, caption in enumerate(captions)}
    names = sorted({image for image, _, _ in lines})
    image_number = {name: place for place, name in enumerate(names)}
    has_splits = any(part for _, _, part in lines)
    here = sorted({(image, caption) for image, caption, part in lines if (part or "train") == split})
    if not here:
        if split == "train":
            raise UserError(f"{root} has no line of the split 'train'")
        return None
    rows = np.asarray([image_number[image] for image, _ in here], dtype=np.int64)
    return Samples(
        FileImages([root.parent / name for name in names]),
        rows,
        np.asarray([number[caption] for _, caption in here], dtype=np.int64),
        [f"{image}|{caption}" for image, caption in here],
        tuple(captions),
        None if has_splits and split != "train" else numbers_of([image for image, _ in here]),
    )


def _lines(path: Path) -> list[tuple[str, str, str]]:
    """(image, caption, split) of each line, the split empty where the file has no such column."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"The caption file {path} {what}: expected a CSV file with the columns image,caption[,split]. "
            "Set it with --data.root FILE.csv"
        )
    found: list[tuple[str, str, str]] = []
    missing: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey="")
            columns = [column.strip() for column in reader.fieldnames or []]
            for column in COLUMNS[:2]:
                if column not in columns:
                    raise UserError(
                        f"{path}, line 1: no column {column!r} among {', '.join(columns) or 'none'}."
                        f"{near(column, columns)} Expected image,caption[,split]"
                    )
            reader.fieldnames = columns
            for line in reader:
                where = f"{path}, line {reader.line_num}"
                if "" in line or None in line.values():
                    raise UserError(f"{where}: expected {len(columns)} fields ({','.join(columns)}); quote commas")
                image, caption, part = (line.get(column, "").strip() for column in COLUMNS)
                if not image or not caption:
                    raise UserError(f"{where}: the {'caption' if image else 'image'} is empty")
                if "split" in columns and part.lower() not in _SPLIT_OF:
                    raise UserError(f"{where}: unknown split {part!r}; expected train, val or test")
                if not (path.parent / image).is_file():
                    missing.append(f"line {reader.line_num}: {path.parent / image}")
                image = posixpath.normpath(image)  # one image has one name, so that groups hold together
                found.append((image, caption, _SPLIT_OF[part.lower()] if part else ""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The caption file {path} cannot be read: {error}") from error
    if missing:
        raise UserError(f"{path}: {len(missing)} image files do not exist, the first: {missing[0]}")
    if not found:
        raise UserError(f"{path} holds no pairs")
    home: dict[str, str] = {}
    for image, _, part in found:
        if home.setdefault(image, part) != part:
            raise UserError(f"{path}: the image {image} is in the splits {home[image]!r} and {part!r}; keep it in one")
    return found
