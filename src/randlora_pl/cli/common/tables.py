"""Plain text tables for the quick commands, which cannot wait for the import of rich."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from randlora_pl.utils.text.printable import printable

NARROW = 24
"""Letters of a narrow column on a terminal."""


def table(header: Sequence[str], rows: Iterable[Sequence[object]], narrow: Sequence[str] = ()) -> str:
    """Return left-aligned columns; the last one is cut to a terminal's width, but not in a file or a pipe.

    Args:
        header: Titles of the columns.
        rows: Cells, as many per row as titles; None is shown as an empty cell.
        narrow: Titles of columns that are cut as well, to `NARROW` letters.
    """
    cells = [list(map(_plain, header)), *(list(map(_plain, row)) for row in rows)]
    watched = sys.stdout.isatty() or "COLUMNS" in os.environ
    if watched:
        most = [NARROW if title in narrow else sys.maxsize for title in header]
        cells = [[_cut(*cell) for cell in zip(row, most, strict=True)] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if watched:
        terminal = shutil.get_terminal_size((120, 24)).columns
        widths[-1] = max(20, terminal - sum(widths[:-1]) - 2 * len(widths[:-1]))
    lines = []
    for row in cells:
        start = "".join(f"{cell:{width}}  " for cell, width in zip(row[:-1], widths[:-1], strict=True))
        lines.append((start + _cut(row[-1], widths[-1])).rstrip())
    return "\n".join(lines)


def _plain(cell: object) -> str:
    return "" if cell is None else printable(str(cell)).replace("\n", "\\n")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def layer_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], every: bool) -> str:
    """Return a plain table.

    Args:
        rows: Per layer ``layer``, ``shape`` and the values; None for a missing value.
        columns: Key and title of each value; a group of layers shows the mean, and the range of whole numbers.
        every: If True, one row per layer instead of one per group.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        name = row["layer"] if every else re.sub(r"\.\d+\.", ".*.", row["layer"])
        groups.setdefault((name, " x ".join(map(str, row["shape"]))), []).append(row)
    body = [
        [name, shape, str(len(members)), *(_mean([member.get(key) for member in members]) for key in columns)]
        for (name, shape), members in groups.items()
    ]
    return table(["layer", "out x in", "layers", *columns.values()], body)


def _mean(values: Sequence[Any]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if all(isinstance(value, int) for value in known):
        low, high = min(known), max(known)
        return str(low) if low == high else f"{low} to {high}"
    return f"{sum(known) / len(known):.4g}"


def entry(name: str, text: str, indent: int = 2, column: int = 30) -> str:
    """Return one option with its explanation, wrapped beside it.

    Args:
        name: The option as the user types it.
        text: Its explanation.
        indent: Spaces before the name.
        column: Column where the explanation starts.
    """
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
    body = textwrap.fill(printable(text), width, initial_indent=" " * column, subsequent_indent=" " * column)
    head = " " * indent + name
    return head + body[len(head) :] if len(head) < column else f"{head}\n{body}"
