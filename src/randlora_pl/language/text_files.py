"""Reading of a user's texts, CSV files and JSON lines, also labelled; every error has file and line."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files import read_plain


@dataclass(frozen=True)
class Examples:
    """The labelled examples of one split.

    Attributes:
        sentences: One or two texts each.
        labels: Class numbers (int), or scores in 0..5 (float) of STS-B.
    """

    sentences: list[tuple[str, ...]]
    labels: list[int] | list[float]


def first_file(root: Path, names: Sequence[str], tree: str, source: str) -> Path:
    """Return the first of the files below a folder that exists; the usual one is named first.

    Raises:
        UserError: None of them exists or can be looked for; the message has the expected tree and the source.
    """
    try:
        for name in names:
            if (root / name).is_file():
                return root / name
        missing = root if not root.is_dir() else root / names[0]
        what = "is not a file" if missing.is_dir() else "is not a folder" if missing.exists() else "does not exist"
    except OSError as error:  # no permission, or too long a name
        missing, what = root, f"cannot be read ({error.strerror or error})"
    raise UserError(f"{missing} {what}. Expected under --data.root: {tree}", f"Get the files: {source}")


def read_text(path: Path) -> str:
    """Return the whole file as UTF-8, without a byte order mark.

    Raises:
        UserError: It cannot be read or is not UTF-8; the message has the line.
    """
    try:
        data = read_plain(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}). Make it readable, or download it again"
        ) from error
    return decoded(data, path)


def decoded(data: bytes, source: object) -> str:
    """Decode all of a file as UTF-8, without a byte order mark.

    Raises:
        UserError: It is not UTF-8; the message has the source and the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{source}, line {line}: this is not UTF-8 text. Convert the file, or download it again"
        ) from error


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text without their ends.

    Only ``\n`` ends a line: `str.splitlines` would also split at the separators (U+2028, U+0085, form feed) that
    sentences from the web contain. A carriage return before it belongs to the end.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_values(path: Path) -> list[tuple[int, Any]]:
    """Return the values of a JSON array, or of a file with one value per line, with the line (from 1) of each start.

    Raises:
        UserError: The file is not such JSON; the message has file and line.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        return _array(path, text)
    values: list[tuple[int, Any]] = []
    for line, record in enumerate(text.split("\n"), 1):
        try:
            values += [(line, json.loads(record))] if record.strip() else []
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                error.lineno = line
            raise _invalid(path, error, line) from error
    return values


def half_character(text: str) -> bool:
    """Return True if a text has an unpaired surrogate, as JSON can write it; no tokenizer takes it."""
    return not text.isascii() and re.search(r"[\ud800-\udfff]", text) is not None


HALF = "has half a character (an unpaired surrogate such as \\ud83d)"


def read_records(
    path: Path, fields: Sequence[str], optional: Sequence[str] = (), numbers: Sequence[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """Return the objects of a JSON array, or of a file with one object per line, whose named fields are text.

    Args:
        path: The file.
        fields: Fields that every object must have; others are left out.
        optional: Fields that it may have.
        numbers: Fields that may be numbers; they come as text, too.

    Returns:
        The line (from 1) on which each object starts, and its fields; nothing without objects.

    Raises:
        UserError: The file is not such JSON, or an object lacks a field; the message has file and line.
    """
    records = []
    for line, value in read_values(path):
        advice = "Correct the record, or download the file again"
        there = [field for field in (*fields, *optional) if isinstance(value, dict) and field in value]
        if not isinstance(value, dict):
            what = f"expected an object with the fields {', '.join(fields or optional)}"
        elif absent := [field for field in fields if field not in value]:
            what = f"the record lacks {', '.join(map(repr, absent))}; each needs {', '.join(fields)}"
            if {"instruction", "output"} <= value.keys():
                advice = "Convert instructions and outputs to prompts and completions as docs/prompts.md shows"
            elif "messages" in value:
                advice = "For conversations: --data.dataset chat"
        elif wrong := [f for f in there if type(value[f]) not in ((str, int, float) if f in numbers else (str,))]:
            what = f"{wrong[0]!r} must be text, not {json.dumps(value[wrong[0]])[:40]}"
        elif broken := [field for field in there if half_character(str(value[field]))]:
            what = f"{broken[0]!r} {HALF}"
        else:
            records.append((line, {field: str(value[field]) for field in there}))
            continue
        raise UserError(f"{path}, line {line}: {what}. {advice}")
    return records


def _array(path: Path, text: str) -> list[tuple[int, Any]]:
    """Return each value of a JSON array with the line on which it starts.

    The array is decoded value by value: `json.loads` does not report the line of a record that lacks a field.
    """
    decode = json.JSONDecoder().raw_decode
    values: list[tuple[int, Any]] = []
    line, counted, position = 1, 0, text.index("[")
    mark = next(_MARK.finditer(text, position))
    if text.startswith("]", mark.end()):
        mark = next(_MARK.finditer(text, mark.end()))
    try:
        while mark[1] != "]":
            position = mark.end()
            value, end = decode(text, position)
            line += text.count("\n", counted, position)
            counted = position
            values.append((line, value))
            mark = next(_MARK.finditer(text, end))
            position = mark.start(1)
            if mark[1] not in {",", "]"}:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = mark.end()
        if position < len(text):
            raise json.JSONDecodeError("Nothing may follow the array", text, position)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, error, text.count("\n", 0, position) + 1) from error
    return values


def _invalid(path: Path, error: ValueError | RecursionError, start: int) -> UserError:
    """Return the error for broken JSON; a quote that does not close is reported far below the record's first line."""
    line, inside = start, ""
    if isinstance(error, RecursionError):
        reason = "nested too deeply"
    elif isinstance(error, json.JSONDecodeError):
        reason, line = error.msg, error.lineno
        inside = f" (in the record that starts on line {start})" if start < line else ""
    else:  # a number of more digits than Python reads
        reason = str(error)[:60]
    return UserError(f"{path}, line {line}{inside}: no valid JSON: {reason}. Correct it, or download the file again")


_MARK = re.compile(r"[ \t\r\n]*([\[\],]?)[ \t\r\n]*")
"""A mark of a JSON array and the white space around it, which matches everywhere."""

TEXTS = (("text",), ("text_a", "text_b"))
COLUMNS = "columns text (or text_a and text_b) and label"


@dataclass(frozen=True)
class Labelled:
    """One labelled text of a file: its position, one or two texts, the label as written."""

    where: str
    texts: tuple[str, ...]
    label: str


def own_files(root: Path, suffix: str, content: str) -> dict[str, Path]:
    """Return the files of a folder by split, or one file to train on alone.

    Args:
        root: The folder, or the file.
        suffix: ``.csv`` or ``.jsonl``.
        content: Noun phrase for the error, what a file has.

    Raises:
        UserError: There is nothing to train on.
    """
    if root.is_file():
        return {"train": root}
    files = {split: root / f"{split}{suffix}" for split in ("train", "val", "test")}
    if not files["train"].is_file():
        tree = f"train{suffix} with {content}; optionally val{suffix} and test{suffix} in the same format"
        raise UserError(f"{files['train']} does not exist. Expected under --data.root: {tree}")
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
    samples: list[Labelled] = []
    for line, fields in rows:
        where = f"{file}, line {line}"
        texts, label = texts_of(where, fields), texts_of(where, fields, (("label",),))
        if not (texts and label):
            raise UserError(f"{where}: expected {COLUMNS}; found {', '.join(fields) or 'nothing'}.")
        if samples and len(texts) != len(samples[0].texts):
            raise UserError(f"{where}: single texts and pairs are mixed; give each record the same columns.")
        samples.append(Labelled(where, texts, *label))
    if not samples:
        raise UserError(f"{file} has no records. Expected: {COLUMNS}")
    return samples


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
        UserError: The header is missing, its columns are divided by other marks than commas, or a record has another
            number of fields.
    """
    text = read_text(file)
    # Spreadsheets of some countries write semicolons.
    first = [text.partition("\n")[0]]
    names = {mark: [name.strip() for name in next(csv.reader(first, delimiter=mark), [])] for mark in ",;\t"}
    known = any(name in names[","] for name in ("label", *TEXTS[0], *TEXTS[1]))
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        if not known and len(names[mark]) > len(names[","]):
            raise UserError(
                f"{file}, line 1: there are {called} between the columns ({', '.join(names[mark])[:120]}); expected "
                "commas. Save the table with commas, and put texts with commas in double quotes"
            )
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


def class_names(rows: Sequence[Labelled], file: Path) -> list[str]:
    """Return the classes of training texts, numbers by size and names by the alphabet; refuse one class and scores."""
    names = {row.label for row in rows}
    numbers = {name: numeric(name) for name in names}
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
    if len(ordered) > 1000:
        raise UserError(
            f"{file}: {len(ordered):,} different labels, such as {ordered[0]!r}, are too many for classes. For "
            "numbers to predict: --data.scores true"
        )
    return ordered


def class_numbers(rows: Sequence[Labelled], classes: Sequence[str]) -> Examples:
    """Return texts with the numbers of their classes; refuse other labels."""
    numbers = {name: place for place, name in enumerate(classes)}
    for row in rows:
        if row.label not in numbers:
            known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise UserError(
                f"{row.where}: the label {row.label[:40]!r} is not one of the training classes."
                f"{near(row.label, classes)} There are {known}"
            )
    return Examples([row.texts for row in rows], [numbers[row.label] for row in rows])


def scores(rows: Sequence[Labelled]) -> Examples:
    """Return texts with scores; refuse labels that are not finite numbers."""
    numbers = [numeric(row.label) for row in rows]
    for row, value in zip(rows, numbers, strict=True):
        if not math.isfinite(value):
            raise UserError(f"{row.where}: score {row.label[:40]!r} is not a number; for classes: --data.scores false")
    return Examples([row.texts for row in rows], numbers)


def numeric(text: str) -> float:
    """Return the number that a text is, or NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
