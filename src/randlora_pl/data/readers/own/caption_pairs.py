"""Images with captions from a table; the label of a line is the index of its caption."""

from pathlib import Path

import numpy as np

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.images.sources import FileImages, PathsBelow
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
    found = read_table(root, COLUMNS, "image,caption[,split]")
    images, captions = found.images("image"), found.filled("caption")
    home: dict[str, str] = {}
    for image, part in zip(images, found.splits(), strict=True):
        if home.setdefault(image, part) != part:
            raise UserError(f"{root}: the image {image} is in the splits {home[image]!r} and {part!r}; keep it in one")
    here = sorted({pair for pair in zip(images, captions, strict=True) if home[pair[0]] == split})
    if not here:
        if split == "train":
            raise UserError(f"{root} has no line of the split 'train'")
        return None
    image_number = {image: index for index, image in enumerate(sorted(home))}
    number = {caption: index for index, caption in enumerate(sorted(set(captions)))}
    return Samples(
        FileImages(PathsBelow(root.parent, list(image_number))),
        np.asarray([image_number[image] for image, _ in here], dtype=np.int64),
        np.asarray([number[caption] for _, caption in here], dtype=np.int64),
        [f"{image}|{caption}" for image, caption in here],
        tuple(number),
        numbers_of([image for image, _ in here]) if split == "train" else None,
    )
