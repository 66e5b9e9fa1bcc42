"""Images with captions from a table; the label of a line is the index of its caption."""

from pathlib import Path

import numpy as np

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.images.decode import FileImages, PathsBelow
from randlora_pl.data.readers.dispatch import Samples, numbers_of
from randlora_pl.data.readers.own.table_columns import read_table
from randlora_pl.utils.errors import UserError

COLUMNS = {"image": ("image",), "caption": ("caption",), "split": ("split",)}
"""Accepted names of each column."""


def pairs(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read the lines of one split of a table (see `read_table`) with the columns ``image,caption[,split]``.

    Image paths are relative to the file. Captions are numbered in sorted order over the whole file, so that all
    splits share the numbers. Lines of one image are a group: a seeded split keeps them together.

    Raises:
        UserError: The file or an image is missing, or a line is wrong; lines are numbered from 1.
    """
    del row
    lines = _lines(root)
    captions = sorted({caption for _, caption, _ in lines})
    number = {caption: index for index, caption in enumerate(captions)}
    names = sorted({image for image, _, _ in lines})
    image_number = {name: index for index, name in enumerate(names)}
    here = sorted({(image, caption) for image, caption, part in lines if part == split})
    if not here:
        if split == "train":
            raise UserError(f"{root} has no line of the split 'train'")
        return None
    rows = np.asarray([image_number[image] for image, _ in here], dtype=np.int64)
    return Samples(
        FileImages(PathsBelow(root.parent, names)),
        rows,
        np.asarray([number[caption] for _, caption in here], dtype=np.int64),
        [f"{image}|{caption}" for image, caption in here],
        tuple(captions),
        numbers_of([image for image, _ in here]) if split == "train" else None,
    )


def _lines(path: Path) -> list[tuple[str, str, str]]:
    """Return (image, caption, split) per line; the split is ``train`` without a split column."""
    found = read_table(path, COLUMNS, "image,caption[,split]")
    images, captions, parts = found.images("image"), found.filled("caption"), found.splits()
    home: dict[str, str] = {}
    for image, part in zip(images, parts, strict=True):
        if home.setdefault(image, part) != part:
            raise UserError(f"{path}: the image {image} is in the splits {home[image]!r} and {part!r}; keep it in one")
    return list(zip(images, captions, parts, strict=True))
