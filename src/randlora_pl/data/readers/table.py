"""User tables of image files with classes or captions: CSV, TSV or Parquet, with row positions for messages."""

import csv
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from randlora_pl.data.catalog import DatasetSpec
from randlora_pl.data.readers import (
    SPLIT_OF,
    Samples,
    class_order,
    in_key_order,
    numbered,
    numbers_of,
    source_split,
)
from randlora_pl.data.sources import FileImages, PathsBelow, absent
from randlora_pl.utils.errors import UserError, near

KINDS = (".csv", ".tsv", ".txt", ".parquet")


@dataclass(frozen=True)
class Table:
    """Selected columns of a file.

    Attributes:
        path: Path of the file.
        columns: Stripped cells of each requested column that exists.
        positions: Position of each row in the file: line numbers from 1, for Parquet row numbers from 1.
        unit: ``line`` or ``row``.
    """

    path: Path
    columns: dict[str, list[str]]
    positions: Sequence[int]
    unit: str = "line"

    def where(self, row: int) -> str:
        """Return the file and position of a row, as the beginning of a message."""
        return f"{self.path}, {self.position(row)}"

    def position(self, row: int) -> str:
        """Return the position of a row in the file."""
        return f"{self.unit} {self.positions[row]}"

    def images(self, column: str) -> list[str]:
        """Return the image files of a column with forward slashes, relative to the table's folder if below it.

        One image has one name, regardless of the notation of its path and of the table's folder. Folders are listed
        once instead of checking each file, and all files must exist.
        """
        home, real = self.path.parent, _real(self.path.parent)
        ways = (real, os.path.abspath(home), home.absolute().as_posix())  # noqa: PTH100 (links stay)
        bases = [f"{way.rstrip('/')}/" for way in ways if _real(way) == real]
        real_of = cache(_real)
        first: dict[str, str] = {}  # name of each file elsewhere, by its real path
        files = []
        for cell in self.filled(column):
            name = posixpath.normpath(cell.replace("\\", "/"))
            base = next((base for base in bases if name.startswith(base)), None)
            if base is not None:
                name = name.removeprefix(base)
            elif name.startswith(("/", "../")) or os.path.isabs(name):  # noqa: PTH117 (also on Windows)
                folder, _, file = name.rpartition("/")
                there = f"{real_of(posixpath.join(real, folder or '/')).rstrip('/')}/{file}"
                name = there.removeprefix(bases[0]) if there.startswith(bases[0]) else first.setdefault(there, name)
            files.append(name)
        missing = absent(home, files)
        if missing:
            kind = "image files do not exist" if len(missing) > 1 else "image file does not exist"
            where = f"{self.position(missing[0])}: {home / files[missing[0]]}"
            raise UserError(f"{self.path}: {len(missing)} {kind}, the first: {where}")
        return files

    def filled(self, column: str) -> list[str]:
        """Return the cells of a column, none of which may be empty."""
        cells = self.columns[column]
        if not all(cells):
            raise UserError(f"{self.where(cells.index(''))}: the {column} is empty")
        return cells

    def splits(self) -> list[str]:
        """Return ``train``, ``val`` or ``test`` per row; ``train`` without a split column."""
        cells = self.columns.get("split", ["train"] * len(self.positions))
        for row, cell in enumerate(cells):
            if cell.lower() not in SPLIT_OF:
                expected = f"expected train, val or test.{near(cell, SPLIT_OF)}"
                raise UserError(f"{self.where(row)}: unknown split {cell!r}; {expected}")
        return [SPLIT_OF[cell.lower()] for cell in cells]


def _real(folder: str | Path) -> str:
    """Return a folder without links and ``..``, or unchanged if that is impossible."""
    try:
        return Path(os.path.realpath(folder)).as_posix()
    except (OSError, ValueError):  # a null byte
        return str(folder)


def read_table(path: Path, wanted: Mapping[str, Sequence[str]], form: str) -> Table:
    """Read the requested columns of a file; its suffix is its format.

    The header of a text file determines the separator: comma, semicolon or tab.

    Args:
        path: Path of the file.
        wanted: Accepted names of each column, compared in lower case. Only ``split`` is optional.
        form: Expected header, for messages.

    Raises:
        UserError: The file is missing, damaged or empty, a column is missing or ambiguous, or a line has too few or
            too many cells.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"The table {path} {what}: expected a CSV, TSV or Parquet file with the columns {form}. "
            "Set it with --data.root FILE.csv"
        )
    if path.suffix.lower() not in KINDS:
        raise UserError(f"The table {path} is not a {', '.join(KINDS)} file. Save it as CSV with the columns {form}")
    table = _parquet(path, wanted, form) if path.suffix.lower() == ".parquet" else _text(path, wanted, form)
    if not table.positions:
        raise UserError(f"{path} has no rows below its header; expected the columns {form}")
    return table


def _choose(where: str, header: Sequence[str], wanted: Mapping[str, Sequence[str]], form: str) -> dict[str, int]:
    header = [name.strip() for name in header]
    chosen = {}
    for column, names in wanted.items():
        matching = [number for number, name in enumerate(header) if name.lower() in names]
        if len(matching) > 1:
            both = " and ".join(repr(header[number]) for number in matching)
            raise UserError(f"{where}: the columns {both} may both be the {column}; rename one. Expected {form}")
        if matching:
            chosen[column] = matching[0]
        elif column != "split":
            there = f"{', '.join(header) or 'none'}.{near(column, header)}"
            raise UserError(f"{where}: no column {column!r} among {there} Expected {form}")
    return chosen


def _text(path: Path, wanted: Mapping[str, Sequence[str]], form: str) -> Table:
    reader = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            reader = csv.reader(stream, delimiter=max(",;\t", key=first.count), strict=True)
            header = next(reader, [])
            chosen = _choose(f"{path}, line 1", header, wanted, form)
            cells: dict[str, list[str]] = {column: [] for column in chosen}
            positions: list[int] = []
            for line in reader:
                if not any(map(str.strip, line)):  # spreadsheets write lines of separators only
                    continue
                if len(line) != len(header):
                    names = ",".join(name.strip() for name in header)
                    where = f"{path}, line {reader.line_num}"
                    raise UserError(f"{where}: expected {len(header)} fields ({names}); quote commas")
                for column, number in chosen.items():
                    cells[column].append(line[number].strip())
                positions.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise UserError(f"The table {path} cannot be read: {error}. Save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        where = "" if reader is None else f", line {reader.line_num}"
        raise UserError(f"The table {path}{where} cannot be read: {error}; check the quotation marks") from error
    return Table(path, cells, positions)


def _parquet(path: Path, wanted: Mapping[str, Sequence[str]], form: str) -> Table:
    try:
        from pyarrow import parquet, types
    except ImportError as error:
        raise UserError(f'{path} needs the package pyarrow: pip install ".[parquet]" in the checkout') from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            chosen = _choose(str(path), schema.names, wanted, form)
            for column, number in chosen.items():
                kind = schema.field(number).type
                if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
                    raise UserError(
                        f"{path}: the column {schema.names[number]!r} has {kind}, expected the {column} as text. "
                        "A folder of Parquet files with the images inside: --data.dataset hf --data.root FOLDER"
                    )
            read = file.read([schema.names[number] for number in chosen.values()])
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"The table {path} cannot be read: {error}") from error
    columns = zip(chosen, read.columns, strict=True)
    cells = {
        name: ["" if cell is None else str(cell).strip() for cell in column.to_pylist()] for name, column in columns
    }
    return Table(path, cells, range(1, read.num_rows + 1), "row")


CLASS_COLUMNS = {
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
    content = read_table(root, CLASS_COLUMNS, "path,label[,split]")
    labels, parts = content.filled("label"), content.splits()
    images = content.images("path")
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
            what = f"the image {image} is already in {content.position(before)}"
            raise UserError(f"{content.where(index)}: {what}, {how}")
    source = source_split(split, list(dict.fromkeys(parts)), root)
    if source is None:
        return None
    classes = class_order((label for label, part in zip(labels, parts, strict=True) if part == "train"), root)
    here = [index for index, part in enumerate(parts) if part == source]
    names = [images[index] for index in here]
    numbers = numbered([labels[index] for index in here], classes, lambda index: content.where(here[index]))
    return in_key_order(FileImages(PathsBelow(root.parent, names)), numbers, names, classes)


CAPTION_COLUMNS = {"image": ("image",), "caption": ("caption",), "split": ("split",)}
"""Accepted names of each column."""


def pairs(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read the lines of one split of a table (see `read_table`) with the columns ``image,caption[,split]``.

    Image paths are relative to the file. Captions are numbered in sorted order over the whole file, so that all
    splits share the numbers. Lines of one image are a group: a seeded split keeps them together.

    Raises:
        UserError: The file or an image is missing, or a line is wrong; lines are numbered from 1.
    """
    del row
    content = read_table(root, CAPTION_COLUMNS, "image,caption[,split]")
    images, captions = content.images("image"), content.filled("caption")
    home: dict[str, str] = {}
    for image, part in zip(images, content.splits(), strict=True):
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
