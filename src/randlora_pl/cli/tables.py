"""Plain text tables for the quick verbs, which cannot wait for rich."""

import shutil
import textwrap
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Left-aligned columns; the last one is cut to the terminal's width.

    Args:
        header: Titles of the columns.
        rows: Cells, as many in each row as there are titles; None is shown as an empty cell.
    """
    cells = [[str(cell) for cell in header], *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    terminal = shutil.get_terminal_size((120, 24)).columns
    room = max(20, terminal - sum(widths[:-1]) - 2 * len(widths[:-1]))
    lines = []
    for row in cells:
        start = "".join(f"{cell:{width}}  " for cell, width in zip(row[:-1], widths[:-1], strict=True))
        end = row[-1] if len(row[-1]) <= room else row[-1][: room - 3] + "..."
        lines.append((start + end).rstrip())
    return "\n".join(lines)


def entry(name: str, text: str, indent: int = 2, column: int = 30) -> str:
    """One option with its explanation, wrapped beside it.

    Args:
        name: What the user types.
        text: What it does.
        indent: Spaces before the name.
        column: Where the explanation starts.
    """
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
    body = textwrap.fill(text, width, initial_indent=" " * column, subsequent_indent=" " * column)
    head = " " * indent + name
    return head + body[len(head) :] if len(head) < column else f"{head}\n{body}"
