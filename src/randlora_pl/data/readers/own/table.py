"""User tables of image files with classes: the columns ``path,label[,split]``."""

from collections.abc import Sequence
from pathlib import Path

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.images.sources import FileImages, PathsBelow
from randlora_pl.data.readers.dispatch import Samples, in_key_order
from randlora_pl.data.readers.own.labels import class_order, numbered, source_split
from randlora_pl.data.readers.own.table_columns import Table, read_table
from randlora_pl.utils.errors import UserError

COLUMNS = {
    "path": ("path", "image", "file", "filename", "file_name"),
    "label": ("label", "class"),
    "split": ("split",),
}
"""Accepted names of each column."""


def table(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read the rows of one split of a table of images; without a split column all rows are ``train``.

    Paths are relative to the file or absolute. The classes are the labels of the train split, in `class_order`.
    Without ``test``, ``val`` is used as ``test``, as in folders.

    Raises:
        UserError: The file, a column or an image is missing, a row is wrong, or an image is listed twice.
    """
    del row
    found = read_table(root, COLUMNS, "path,label[,split]")
    labels, parts = found.filled("label"), found.splits()
    images = found.images("path")
    _refuse_twice(found, images, labels, parts)
    source = source_split(split, list(dict.fromkeys(parts)), root)
    if source is None:
        return None
    classes = class_order((label for label, part in zip(labels, parts, strict=True) if part == "train"), root)
    here = [index for index, part in enumerate(parts) if part == source]
    names = [images[index] for index in here]
    numbers = numbered([labels[index] for index in here], classes, lambda index: found.where(here[index]))
    return in_key_order(FileImages(PathsBelow(root.parent, names)), numbers, names, classes)


def _refuse_twice(found: Table, images: Sequence[str], labels: Sequence[str], parts: Sequence[str]) -> None:
    """Refuse repeated images, which would count twice or be in both training and test."""
    if len(set(images)) == len(images):
        return
    first: dict[str, int] = {}
    for index, image in enumerate(images):
        before = first.setdefault(image, index)
        if before != index:
            if parts[before] != parts[index]:
                how = f"in the splits {parts[before]!r} and {parts[index]!r}; keep it in one"
            elif labels[before] != labels[index]:
                how = f"as {labels[before]!r} and {labels[index]!r}; an image has one class"
            else:
                how = "and would count twice; delete one line"
            what = f"the image {image} is already in {found.position(before)}"
            raise UserError(f"{found.where(index)}: {what}, {how}")
