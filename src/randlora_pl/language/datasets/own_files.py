"""A user's own labelled texts: CSV files with a header, or JSON lines."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from randlora_pl.language.datasets.glue import Examples
from randlora_pl.language.datasets.text_files import read_records, read_text
from randlora_pl.utils.errors import UserError, near

TEXTS = (("text",), ("text_a", "text_b"))
COLUMNS = "columns text (or text_a and text_b) and label"
_TREE = "{0} with " + COLUMNS + "; optionally val{1} and test{1} in the same format"
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class Labelled:
    """One labelled text of a file: where it stands, one or two texts, the label as written."""

    where: str
    texts: tuple[str, ...]
    label: str


def own_files(root: Path, suffix: str) -> dict[str, Path]:
    """Return the files of a folder by split (suffix ``.csv`` or ``.jsonl``), or one file to train on alone.

    Raises:
        UserError: There is nothing to train on.
    """
    if root.is_file():
        return {"train": root}
    files = {split: root / f"{split}{suffix}" for split in ("train", "val", "test")}
    if not files["train"].is_file():
        tree = _TREE.format(files["train"].name, suffix)
        raise UserError(f"{files['train']} does not exist. Expected below --data.root: {tree}")
    return {split: file for split, file in files.items() if file.is_file()}


def read_own(file: Path) -> list[Labelled]:
    """Return the labelled texts of one file, in its order.

    Raises:
        UserError: It is empty, or a line is wrong; the message has file and line.
    """
    if file.suffix.lower() in (".csv", ".tsv"):
        rows = csv_rows(file)
    else:
        rows = read_records(file, ("label",), optional=[*TEXTS[0], *TEXTS[1]], numbers=("label",))
    found: list[Labelled] = []
    for line, fields in rows:
        where = f"{file}, line {line}"
        texts, label = texts_of(where, fields), texts_of(where, fields, (("label",),))
        if not (texts and label):
            raise UserError(f"{where}: expected {COLUMNS}; found {', '.join(fields) or 'nothing'}.")
        if found and len(texts) != len(found[0].texts):
            raise UserError(f"{where}: single texts and pairs are mixed; give each record the same columns.")
        found.append(Labelled(where, texts, *label))
    if not found:
        raise UserError(f"{file} has no records. Expected: {COLUMNS}")
    return found


def texts_of(
    where: str, fields: Mapping[str, str], groups: Sequence[tuple[str, ...]] = TEXTS
) -> tuple[str, ...] | None:
    """Return the fields of the first group that a record has, stripped, None without one; refuse an empty field."""
    names = next((names for names in groups if all(name in fields for name in names)), None)
    if empty := next((name for name in names or () if not fields[name].strip()), None):
        raise UserError(f"{where}: {empty!r} is empty. Fill it, or delete the record.")
    return names and tuple(fields[name].strip() for name in names)


def csv_rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Return fields by the header's names, with the line on which each record ends.

    Raises:
        UserError: The header is missing, or a record has another number of fields.
    """
    text = read_text(file)
    _check_commas(file, text.partition("\n")[0])
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        for fields in reader:
            if not fields:  # an empty line
                continue
            if len(fields) != len(header):
                what = f"{len(fields)} fields, but the header has {len(header)} ({', '.join(header)[:120]})"
                raise UserError(f"{file}, line {reader.line_num}: {what}. Put texts with commas in double quotes")
            rows.append((reader.line_num, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: no valid CSV: {error}. Correct the file") from error
    return rows


def _check_commas(file: Path, header: str) -> None:
    """Refuse a table with semicolons, as spreadsheets of some countries write it, or tabs between the columns."""
    names = {mark: [name.strip() for name in next(csv.reader([header], delimiter=mark), [])] for mark in ",;\t"}
    known = any(name in names[","] for name in ("label", *TEXTS[0], *TEXTS[1]))
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        if not known and len(names[mark]) > len(names[","]):
            raise UserError(
                f"{file}, line 1: there are {called} between the columns ({', '.join(names[mark])[:120]}); expected "
                "commas. Save the table with commas, and put texts with commas in double quotes"
            )


def class_names(rows: Sequence[Labelled], file: Path) -> list[str]:
    """Return the classes of training texts, numbers by size and names by the alphabet; refuse one class and scores."""
    names = {row.label for row in rows}
    numbers = {name: _number(name) for name in names}
    if all(map(math.isfinite, numbers.values())):
        broken = next((row for row in rows if not numbers[row.label].is_integer()), None)
        if broken is not None:
            raise UserError(
                f"{broken.where}: the label {broken.label} looks like a score: --data.scores true predicts such "
                "numbers. Classes are names or whole numbers."
            )
        ordered = sorted(names, key=lambda name: (numbers[name], name))
    else:
        ordered = sorted(names)
    if len(ordered) < 2:
        raise UserError(f"{file}: there is only the class {ordered[0]!r}; a classifier needs two or more.")
    if len(ordered) > _MOST_CLASSES:
        raise UserError(
            f"{file}: {len(ordered):,} different labels, such as {ordered[0]!r}, are too many for classes. For "
            "numbers to predict: --data.scores true"
        )
    return ordered


def class_numbers(rows: Sequence[Labelled], classes: Sequence[str]) -> Examples:
    """Return texts with the numbers of their classes; refuse other labels."""
    numbers = {name: number for number, name in enumerate(classes)}
    for row in rows:
        if row.label not in numbers:
            known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise UserError(
                f"{row.where}: the label {row.label[:40]!r} is not one of the training classes."
                f"{near(row.label, classes)} There are {known}"
            )
    return Examples([row.texts for row in rows], [numbers[row.label] for row in rows], tuple(classes))


def scores(rows: Sequence[Labelled]) -> Examples:
    """Return texts with scores; refuse labels that are not finite numbers."""
    numbers = [_number(row.label) for row in rows]
    for row, number in zip(rows, numbers, strict=True):
        if not math.isfinite(number):
            raise UserError(f"{row.where}: score {row.label[:40]!r} is not a number; for classes: --data.scores false")
    return Examples([row.texts for row in rows], numbers, ())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
