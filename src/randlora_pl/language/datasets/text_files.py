"""Reading of a user's text and JSON files; every error names file and line."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.plain_files import read_plain


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
    raise UserError(f"{missing} {what}. Expected below --data.root: {tree}", f"Get the files: {source}")


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


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file without their ends (see `lines_of`).

    Raises:
        UserError: See `read_text`.
    """
    return lines_of(read_text(path))


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text without their ends.

    Only ``\n`` ends a line: `str.splitlines` would also split at the separators (U+2028, U+0085, form feed) that
    sentences from the web contain. A carriage return before it belongs to the end.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


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
    text = read_text(path)
    values = _array(path, text) if text.lstrip().startswith("[") else _one_a_line(path, text)
    records = []
    for line, value in values:
        advice = "Correct the record, or download the file again"
        there = [field for field in (*fields, *optional) if isinstance(value, dict) and field in value]
        if not isinstance(value, dict):
            what = f"expected an object with the fields {', '.join(fields or optional)}"
        elif absent := [field for field in fields if field not in value]:
            what = f"the record lacks {', '.join(map(repr, absent))}; each needs {', '.join(fields)}"
            if {"instruction", "output"} <= value.keys():
                advice = "Convert instructions and outputs to prompts and completions as docs/prompts.md shows"
        elif wrong := [field for field in there if not _is_text(value[field], field in numbers)]:
            what = f"{wrong[0]!r} must be text, not {json.dumps(value[wrong[0]])[:40]}"
        elif broken := [f for f in there if not str(value[f]).isascii() and _HALF.search(value[f])]:
            what = f"{broken[0]!r} has half a character (an unpaired surrogate such as \\ud83d)"
        else:
            records.append((line, {field: str(value[field]) for field in there}))
            continue
        raise UserError(f"{path}, line {line}: {what}. {advice}")
    return records


def _is_text(value: Any, or_number: bool) -> bool:
    return isinstance(value, str) or (or_number and isinstance(value, int | float) and not isinstance(value, bool))


def _array(path: Path, text: str) -> list[tuple[int, Any]]:
    """Return each value of a JSON array with the line on which it starts.

    The array is decoded value by value: `json.loads` does not report the line of a record that lacks a field.
    """
    decode = json.JSONDecoder().raw_decode
    values: list[tuple[int, Any]] = []
    line, counted = 1, 0
    position = _after_space(text, text.index("[") + 1)
    mark = "]" if text.startswith("]", position) else ","
    try:
        while mark == ",":
            value, end = decode(text, position)
            line += text.count("\n", counted, position)
            counted = position
            values.append((line, value))
            position = _after_space(text, end)
            mark = text[position : position + 1]
            if mark not in {",", "]"}:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            if mark == ",":
                position = _after_space(text, position + 1)
        position = _after_space(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("Nothing may follow the array", text, position)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, error, text.count("\n", 0, position) + 1) from error
    return values


def _one_a_line(path: Path, text: str) -> list[tuple[int, Any]]:
    """Return each value of a file with one per line, with its line; empty lines are left out."""
    values = []
    for line, record in enumerate(text.split("\n"), 1):
        try:
            values += [(line, json.loads(record))] if record.strip() else []
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                error.lineno = line
            raise _invalid(path, error, line) from error
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


_HALF = re.compile(r"[\ud800-\udfff]")
"""JSON can write half of a character from outside of the basic plane; no tokenizer takes it."""

_SPACE = re.compile(r"[ \t\r\n]*")
"""White space of JSON."""


def _after_space(text: str, position: int) -> int:
    return found.end() if (found := _SPACE.match(text, position)) else position
