"""A user's own tables of images: CSV, TSV or Parquet files with classes or captions, and Hugging Face datasets."""

import csv
import itertools
import json
import os
import posixpath
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from randlora_pl.data.catalog import CAPTION_COLUMNS, CLASS_COLUMNS, SEVERAL, SPLIT_OF, DatasetSpec, table_in
from randlora_pl.data.readers import Samples, class_order, numbers_of, source_split
from randlora_pl.data.readers.label_sets import check_joined, classes_in, classified, known_classes, labelled
from randlora_pl.data.sources import SKIP, EncodedImages, FileImages, absent
from randlora_pl.utils.errors import UnreadableImageError, UserError, first_line, install, log, near
from randlora_pl.utils.files import parse_json

KINDS = (".csv", ".tsv", ".txt", ".parquet")


@dataclass(frozen=True)
class Table:
    """Selected columns of a file.

    Attributes:
        path: Path of the file.
        columns: Stripped cells of each requested column that exists; `SEVERAL` is one of its own.
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


def _read_table(path: Path, wanted: Mapping[str, Sequence[str]], form: str) -> Table:
    """Read the requested columns of a file; its suffix is its format.

    The header of a text file determines the separator: comma, semicolon or tab. ``wanted`` has the accepted names of
    each column in lower case, of which only ``split`` is optional, and ``form`` the expected header, for messages.
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
            chosen[SEVERAL if header[matching[0]].lower() == SEVERAL else column] = matching[0]
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
        raise UserError(f"{path} needs the package pyarrow: {install('parquet')}") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            chosen = _choose(str(path), schema.names, wanted, form)
            for column, number in chosen.items():
                kind = schema.field(number).type
                if column == SEVERAL and (types.is_list(kind) or types.is_large_list(kind)):  # Polars writes large ones
                    continue
                if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
                    raise UserError(
                        f"{path}: the column {schema.names[number]!r} has {kind}, expected the {column} as text. "
                        "A folder of Parquet files with the images inside: --data.dataset hf --data.root FOLDER"
                    )
            read = file.read([schema.names[number] for number in chosen.values()])
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"The table {path} cannot be read: {error}") from error
    columns = zip(chosen, read.columns, strict=True)
    cells = {name: ["" if cell is None else _text_of(cell) for cell in column.to_pylist()] for name, column in columns}
    return Table(path, cells, range(1, read.num_rows + 1), "row")


def _text_of(cell: object) -> str:
    return json.dumps(cell) if isinstance(cell, list) else str(cell).strip()


def table(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read the rows of one split of a table of images; without a split column all rows are ``train``.

    Paths are relative to the file or absolute. The classes are the labels of the train split, in `class_order`.
    Without ``test``, ``val`` is used as ``test``, as in folders. In a column `SEVERAL` a cell may list any number.

    Raises:
        UserError: The file, a column or an image is missing, a row is wrong, or an image is listed twice.
    """
    root = table_in(root) or root
    content = _read_table(root, CLASS_COLUMNS, "path,label[,split], or labels for several of an image")
    several = SEVERAL in content.columns
    if several:
        listed = [classes_in(cell, content.where(row)) for row, cell in enumerate(content.columns[SEVERAL])]
    else:
        listed = [[label] for label in content.filled("label")]
        check_joined(content.columns["label"], content.where)
    parts, images = content.splits(), content.images("path")
    first: dict[str, int] = {}
    for index, image in enumerate(images):
        before = first.setdefault(image, index)
        if before != index:
            if parts[before] != parts[index]:
                how = f"in the splits {parts[before]!r} and {parts[index]!r}; keep it in one"
            elif listed[before] != listed[index]:
                both = " and ".join(repr(";".join(listed[row])) for row in (before, index))
                how = f"as {both}; list all of its classes in one line, in a column {SEVERAL!r}"
            else:
                how = "and would count twice; delete one line"
            what = f"the image {image} is already in {content.position(before)}"
            raise UserError(f"{content.where(index)}: {what}, {how}")
    source = source_split(split, list(dict.fromkeys(parts)), root)
    if source is None:
        return None
    train = (names for names, part in zip(listed, parts, strict=True) if part == "train")
    classes = class_order(itertools.chain.from_iterable(train), root)
    if not classes:
        raise UserError(f"{root}: no training image has a class. Write classes into the column {SEVERAL}")
    here = [index for index, part in enumerate(parts) if part == source]
    names, chosen = [images[index] for index in here], [listed[index] for index in here]
    make = labelled if several else classified
    return make(FileImages(names, root.parent), chosen, names, classes, lambda index: content.where(here[index]))


def pairs(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read the lines of one split of a table (see `_read_table`) with the columns ``image,caption[,split]``.

    Image paths are relative to the file. Captions are numbered in sorted order over the whole file, so that all
    splits share the numbers. Lines of one image are a group: a seeded split keeps them together.

    Raises:
        UserError: The file or an image is missing, or a line is wrong; lines are numbered from 1.
    """
    content = _read_table(root, CAPTION_COLUMNS, "image,caption[,split]")
    images, captions = content.images("image"), content.filled("caption")
    home: dict[str, str] = {}
    for image, part in zip(images, content.splits(), strict=True):
        if home.setdefault(image, part) != part:
            raise UserError(f"{root}: the image {image} is in the splits {home[image]!r} and {part!r}; keep it in one")
    here = sorted({pair for pair in zip(images, captions, strict=True) if home[pair[0]] == split})
    if not here:
        if split == "train":
            raise UserError(f"{root} has no line for the split 'train'")
        return None
    image_number = {image: index for index, image in enumerate(sorted(home))}
    number = {caption: index for index, caption in enumerate(sorted(set(captions)))}
    return Samples(
        FileImages(list(image_number), root.parent),
        np.asarray([image_number[image] for image, _ in here], dtype=np.int64),
        np.asarray([number[caption] for _, caption in here], dtype=np.int64),
        [f"{image}|{caption}" for image, caption in here],
        tuple(number),
        numbers_of([image for image, _ in here]) if split == "train" else None,
    )


@dataclass(frozen=True)
class HubImages(EncodedImages):
    """Encoded images of one split.

    Attributes:
        data: `datasets.Dataset` with only the image column; it is pickled as its file names.
        title: Name of the split for messages.
        home: Folder of images stored as relative paths.
    """

    data: Any
    title: str
    home: Path

    def __len__(self) -> int:
        return len(self.data)

    def stored(self, index: int) -> tuple[Path, bytes | None]:
        """Return the path of image ``index``, or its name and bytes; an empty one is unreadable."""
        (cell,) = self.data[index].values()
        cell = cell or {}
        name = Path(f"{self.name(index)}{' (' + cell['path'] + ')' if cell.get('path') else ''}")
        if cell.get("bytes") is not None:
            return name, cell["bytes"]
        if cell.get("path"):
            return self.home / cell["path"], None
        raise UnreadableImageError(f"The image {name} is empty.", SKIP, str(name))

    def name(self, index: int) -> str:
        """Return the split and the row number."""
        return f"{self.title}, row {index}"


def hub(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read one split of a folder of Hugging Face ``datasets``.

    Classes are those with images in the train split: names of the ``ClassLabel`` in its order, or the distinct labels
    in `class_order`. Keys are ``SPLIT/NUMBER``. A split without labels is ignored. Without ``test``, ``val`` is used
    as ``test``, as in folders. A column of lists of labels gives an image several classes.

    Raises:
        UserError: The package is missing; the folder has another layout, is damaged or incomplete, or has no train
            split; or the image or label column is ambiguous.
    """
    try:
        from datasets import Image, disable_progress_bars
    except ImportError as error:
        raise UserError(f"--data.dataset hf needs the package datasets ({error}): {install('hf')}") from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    labels: dict[str, list[list[str]]] = {}
    names_of: dict[str, list[str] | None] = {}
    data: dict[str, Any] = {}
    for name, home in _splits(root).items():
        read = load_split(root, home)
        labels[name], names_of[name], several = _labels(root, name, read)
        if any(labels[name]):
            data[name] = read
        else:
            log.warning("%s: the split %r has no labels and is ignored", root, name)
    source = source_split(split, data, root)
    if source is None:
        return None
    there = set(itertools.chain.from_iterable(labels["train"]))
    named = names_of["train"]
    classes = class_order(there, root) if named is None else [name for name in named if name in there]
    title = f"{root}, split {source!r}"
    # the feature ``Image``, or the same two fields
    kinds = {name: set(kind) if isinstance(kind, dict) else type(kind) for name, kind in data[source].features.items()}
    possible = [name for name, kind in kinds.items() if kind in (Image, {"bytes", "path"})]
    if len(possible) != 1:
        what, change = f"the columns {', '.join(possible)} have images; keep one of them", 'remove_columns(["NAME"])'
        if not possible:
            what = f"none of the columns {', '.join(kinds)} has images. If one has paths"
            change = 'cast_column("NAME", datasets.Image())'
        raise UserError(f'{root}: {what}: dataset.{change}.save_to_disk("FOLDER")')
    column = possible[0]
    images = data[source].select_columns([column])
    if isinstance(images.features[column], Image):
        images = images.cast_column(column, Image(decode=False))
    keys = [f"{source}/{number:08d}" for number in range(len(images))]
    make = labelled if several else classified
    return make(HubImages(images, title, root), labels[source], keys, classes, lambda index: f"{title}, row {index}")


def _splits(root: Path) -> dict[str, Path | list[Path]]:
    saved = root / "dataset_dict.json"
    sources: Mapping[str, Path | list[Path]]
    if saved.is_file():
        try:
            sources = {str(name): root / str(name) for name in parse_json(saved.read_text(encoding="utf-8"))["splits"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{saved} is damaged ({error}). Save the dataset again") from error
    elif (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        return {"train": root}
    else:
        sources = _parquet_files(root)
        if len(sources) == 1 and not SPLIT_OF.keys() & {name.lower() for name in sources}:
            return {"train": next(iter(sources.values()))}
    used: dict[str, Path | list[Path]] = {}
    for name, home in sources.items():
        split = SPLIT_OF.get(name.lower())
        if split is None:
            log.warning("%s: the split %r is not train, validation or test and is ignored", root, name)
        elif split in used:
            raise UserError(f"{root}: two splits are named like {split!r}; keep one of them ({', '.join(sources)})")
        else:
            used[split] = home
    return used


def _parquet_files(root: Path) -> dict[str, list[Path]]:
    """Return the Parquet files per split: ``SPLIT-00000-of-00002.parquet``, ``SPLIT.parquet``, ``SPLIT/0000.parquet``.

    All must be there, and in one folder.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    expected: dict[str, int] = {}
    homes = set()
    for path in sorted(root.rglob("*.parquet")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        shard = re.fullmatch(r"(.+?)-\d+-of-(\d+)(-.*)?", path.stem)
        name, home = shard[1] if shard else path.stem, path.parent
        if name.lower() not in SPLIT_OF and home != root and home.name.lower() in SPLIT_OF:
            name, home = home.name, home.parent
        files[name].append(path)
        homes.add(str(home))
        if shard:
            expected[name] = int(shard[2])
        with path.open("rb") as stream:
            start = stream.read(8)
        if start[:4] != b"PAR1":
            hint = "a pointer of Git LFS; fetch it: git lfs pull" if start == b"version " else "download it again"
            raise UserError(f"{path} is not a Parquet file ({hint})")
    if not files:
        what = "has no dataset" if root.is_dir() else "is a file" if root.exists() else "does not exist"
        raise UserError(
            f"The data folder {root} {what}; expected a folder of Dataset.save_to_disk, or of Parquet files such as "
            "data/train-00000-of-00001.parquet. Set it with --data.root FOLDER"
        )
    if len(homes) > 1:
        some = ", ".join(sorted(homes)[:5])
        raise UserError(f"{root} has {len(homes)} folders of Parquet files. Set one with --data.root: {some}")
    for name, count in expected.items():
        if count != len(files[name]):
            there = f"{len(files[name])} of {count} files of the split {name!r} exist"
            raise UserError(f"{root}: {there}; download the others")
    return files


def load_split(root: Path, home: Path | list[Path]) -> Any:
    """Load one split as a `datasets.Dataset`, mapped into memory: a saved folder, or Parquet files."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise UserError(f"{root} needs datasets ({error}): {install('hf')}") from error
    try:
        if isinstance(home, Path):
            return load_from_disk(str(home))
        return Dataset.from_parquet([str(path) for path in home])
    except Exception as error:  # it raises OSError, ValueError, KeyError, pyarrow's and its own errors
        where = home if isinstance(home, Path) else root
        reason = first_line(error.__cause__ or error)
        raise UserError(f"The dataset in {where} cannot be read ({reason}). Save or download it again") from error


def _labels(root: Path, split: str, data: Any) -> tuple[list[list[str]], list[str] | None, bool]:
    """Return the labels of each sample, the names of a ``ClassLabel``, and True if a sample may have several."""
    from datasets import ClassLabel, Value

    kinds = data.features.items()
    inner = {name: getattr(feature, "feature", None) for name, feature in kinds}  # of lists
    lists = [name for name, kind in inner.items() if isinstance(kind, ClassLabel) or kind == Value("string")]
    named = [name for name, feature in kinds if isinstance(feature, ClassLabel)]
    possible = named or [name for name, feature in kinds if isinstance(feature, Value)]
    usual = ("label", "labels", "fine_label", "class", "target")  # in order of preference
    column = named[0] if len(named) == 1 else next((name for name in usual if name in possible), None)
    several = column is None and bool(lists)
    if several:
        column = lists[0] if len(lists) == 1 else next((name for name in usual if name in lists), None)
    if column is None:
        raise UserError(
            f"{root}: the label column is ambiguous among {', '.join(data.features)}. "
            'Name it "label": dataset.rename_column("NAME", "label").save_to_disk("FOLDER")'
        )
    values = data.select_columns([column])[:][column]
    names: list[str] | None = getattr(inner[column] if several else data.features[column], "names", None)
    if several:
        return [known_classes(listed, names) for listed in values], names, True
    if names is None:
        texts = ["" if value is None else str(value).strip() for value in values]
    else:  # the Hub stores -1 for hidden labels
        texts = ["" if value is None or value < 0 else names[value] for value in values]
    if "" in texts and (any(texts) or split == "train"):
        raise UserError(f"{root}, split {split!r}, row {texts.index('')}: the label ({column!r}) is empty")
    return [[text] if text else [] for text in texts], names, False
