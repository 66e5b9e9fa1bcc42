"""Plain text tables for the quick verbs, which cannot wait for rich."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from randlora_pl.utils.text.printable import printable

NARROW = 24
"""Letters that a narrow column has on a terminal."""


def table(header: Sequence[str], rows: Iterable[Sequence[object]], narrow: Sequence[str] = ()) -> str:
    """Left-aligned columns; on a terminal the last one is cut to its width, in a file or a pipe nothing is.

    Args:
        header: Titles of the columns.
        rows: Cells, as many in each row as there are titles; None is shown as an empty cell.
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


def entry(name: str, text: str, indent: int = 2, column: int = 30) -> str:
    """One option with its explanation, wrapped beside it.

    Args:
        name: What the user types.
        text: What it does.
        indent: Spaces before the name.
        column: Where the explanation starts.
    """
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
    body = textwrap.fill(printable(text), width, initial_indent=" " * column, subsequent_indent=" " * column)
    head = " " * indent + name
    return head + body[len(head) :] if len(head) < column else f"{head}\n{body}"
