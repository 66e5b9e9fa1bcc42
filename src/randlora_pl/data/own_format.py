"""The format of a user's own data, recognized from the files below their root. Imports neither PyTorch nor pyarrow."""

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from randlora_pl.data.locations import as_typed, is_command, is_pattern, is_url
from randlora_pl.utils.errors import UserError

FORMATS = {
    "folder": "a sub-folder of images for each class",
    "table": "a CSV, TSV or Parquet file with a column of labels",
    "pairs": "a CSV, TSV or Parquet file with a column of captions",
    "hf": "a Hugging Face dataset",
    "webdataset": "tar shards",
}
"""Formats of a user's own images, by the name of their dataset."""


def format_of(root: Path) -> str:
    """Return the name of the dataset (see `FORMATS`) that the files of a root are.

    Raises:
        UserError: The files are of no known format, or of several; the message has the choices.
    """
    found = list(formats_of(root))
    if len(found) == 1:
        return found[0]
    if found:
        what = " and ".join(f"{FORMATS[name]} ({name})" for name in found)
        raise UserError(f"{root} has {what}.", f"Choose: --data.dataset {' or --data.dataset '.join(found)}")
    if not root.exists():
        raise UserError(f"The data folder {root} does not exist. Set it with --data.root PATH")
    raise UserError(f"{root} is not data of a known format: {', '.join(FORMATS.values())}. See docs/your_own_data.md")


def formats_of(root: Path) -> Iterator[str]:
    """Yield the formats that the files of a root fit."""
    typed = as_typed(root)
    if is_url(typed) or is_command(typed) or (is_pattern(typed) and not root.exists()):
        yield "webdataset"
    elif root.is_file() and root.suffix.lower() in (".csv", ".tsv", ".parquet"):
        from randlora_pl.data.readers.table import CAPTION_COLUMNS, CLASS_COLUMNS

        header = {name.strip().lower() for name in _header(root)}
        for name, column in (("table", CLASS_COLUMNS["label"]), ("pairs", CAPTION_COLUMNS["caption"])):
            if header.intersection(column):
                yield name
    elif root.is_file():
        lines = []
        with suppress(OSError, ValueError), root.open(encoding="utf-8-sig") as stream:
            lines = [line for line in stream.read(2**16).splitlines() if line.strip() and not line.startswith("#")]
        if re.search(r"\.(tar(\.\w+)?|tgz)$", root.name) or (lines and ".tar" in lines[0]):
            yield "webdataset"
    elif root.is_dir():
        from randlora_pl.data.readers.dispatch import SPLIT_OF

        below = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        files = [path for path in root.iterdir() if not path.is_dir()]
        for part in below:
            if part.name.lower() in ("data", *SPLIT_OF):  # not a class: listing a million images takes seconds
                files += [path for path in part.iterdir() if not path.is_dir()]
        suffixes = {path.suffix for path in files if not path.name.startswith(".")}
        saved = {path.name for path in files if path.parent == root}
        if "dataset_dict.json" in saved or {"state.json", "dataset_info.json"} <= saved or ".parquet" in suffixes:
            yield "hf"
        if ".tar" in suffixes:
            yield "webdataset"
        if any(_holds_image(path, 4) for path in below):
            yield "folder"


def _holds_image(home: Path, depth: int) -> bool:
    """Return True if there is an image at most so many folders below one, such as SPLIT/CLASS/IMAGE."""
    from randlora_pl.data.sources import is_image

    if any(map(is_image, home.iterdir())):  # not glob, which skips folders that cannot be read
        return True
    return depth > 0 and any(_holds_image(path, depth - 1) for path in home.iterdir() if path.is_dir())


def _header(file: Path) -> list[str]:
    try:
        if file.suffix.lower() == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(file).names)
        with file.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline(2**20)
        return next(csv.reader([first], delimiter=max(",;\t", key=first.count)), [])
    except (ImportError, OSError, ValueError, csv.Error):  # pyarrow's errors are ValueErrors
        return []
