"""Tables as plain text, Markdown and CSV, and the facts of a run."""

import csv
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import zip_longest
from types import SimpleNamespace
from typing import TYPE_CHECKING

from randlora_pl.utils.text.formatting import for_cell, printable

if TYPE_CHECKING:
    from rich.table import Table

_GAP = "  "
_SHORT = 10
"""Columns of so few letters are wrapped last."""


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], optional: Sequence[str] = (), right: Collection[int] = ()
) -> str:
    """Return a plain table, whose columns are wrapped to fit a terminal, but not in a file or a pipe.

    rich would take 0.8 s for the 1,400 rows of ``models --all``, and shortens numbers beside long names.

    Args:
        header: Titles of the columns.
        rows: Cells, as many per row as titles; None is shown as an empty cell.
        optional: Titles of columns that a narrow terminal leaves out, the first one first.
        right: Indices of right-aligned columns.
    """
    columns = [list(map(_plain, column)) for column in zip(header, *rows, strict=True)]
    widths, omitted, note = [max(map(len, column)) for column in columns], [], []
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        terminal = shutil.get_terminal_size((120, 24)).columns
        room = terminal - len(_GAP) * (len(columns) - 1)
        longest = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
        for title in filter(header.__contains__, optional):
            if sum(min(width, max(24, word)) for width, word in zip(widths, longest, strict=True)) <= room:
                break  # all are readable: wrapped to 24 letters or more
            for index in (index for index, other in enumerate(header) if other == title):
                widths[index] = longest[index] = 0
                room += len(_GAP)
            omitted.append(title)
        widths = _shrunk(widths, longest, room)
        if omitted:
            note = textwrap.wrap(f"(left out to fit the terminal: {', '.join(omitted)})", max(1, terminal))
    kept = [index for index, width in enumerate(widths) if header[index] not in omitted]
    lines = []
    for row in zip(*columns, strict=True):
        wrapped = {i: [row[i]] for i in kept}
        for index in (index for index in kept if len(row[index]) > widths[index]):
            wrapped[index] = textwrap.wrap(row[index], widths[index], break_on_hyphens=False)
        for parts in zip_longest(*wrapped.values(), fillvalue=""):
            cells = zip(kept, parts, strict=True)
            aligned = [part.rjust(widths[i]) if i in right else part.ljust(widths[i]) for i, part in cells]
            lines.append(_GAP.join(aligned).rstrip())
    return "\n".join([*lines, *note])


def _plain(cell: object) -> str:
    return "" if cell is None else printable(str(cell)).replace("\n", "\\n")


def _shrunk(widths: Sequence[int], longest: Sequence[int], room: int) -> list[int]:
    """Return widths whose sum fits the room: the widest column shrinks first, long words are broken after spaces."""
    whole = [width if width <= _SHORT else word for width, word in zip(widths, longest, strict=True)]
    fitting = [min(width, max(1, room)) for width in widths]
    for least in (whole, [max(1, min(width, room // 2)) for width in whole], [1] * len(widths)):
        while sum(fitting) > room and (wide := [i for i, width in enumerate(fitting) if width > least[i]]):
            fitting[max(wide, key=fitting.__getitem__)] -= 1
    return fitting


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return the lines of a Markdown table.

    pandas' own writer needs another package, pads every cell to the widest, and aligns by the type of a column.

    Args:
        header: Titles of the columns.
        rows: Cells as Markdown, as many per row as titles.
        left: Columns of words, which are left-aligned; the others hold numbers.
    """
    rules = ["---" if column in left else "---:" for column in range(len(header))]
    return [f"| {' | '.join(header)} |", f"|{'|'.join(rules)}|", *(f"| {' | '.join(row)} |" for row in rows)]


def facts_table(facts: Mapping[str, str]) -> "Table":
    """Return a rich table of two columns, names in bold beside their texts; facts without a text are left out."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in facts.items():
        if text:
            table.add_row(name, text)
    return table


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    r"""Return rows as CSV text with line feeds.

    Cells that look like spreadsheet formulas are escaped, and so are bytes that are not UTF-8 (``\udcff``).
    """
    lines: list[str] = []
    # With lineterminator="\n", the writer of Python 3.11 does not quote a lone carriage return, which readers treat as
    # the end of the line.
    stream = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    csv.writer(stream).writerows([for_cell(c) if isinstance(c, str) else c for c in row] for row in rows)
    return "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


def star(name: str) -> str:
    """Return a layer's name with a star in place of each number that a dot follows.

    Examples:
        >>> star("layers.0.1.mlp.fc1")
        'layers.*.*.mlp.fc1'
    """
    return _NUMBER.sub("*", name)


def group_names(names: Iterable[tuple[str, Hashable]]) -> dict[tuple[str, Hashable], list[int]]:
    """Return the positions of each group by its pattern and kind; groups of one kind and pattern belong together.

    Groups of another kind with the same pattern keep the numbers in which they differ.

    Examples:
        >>> list(group_names([("a.0.b.0.fc", 3), ("a.0.b.1.fc", 3), ("a.1.b.0.fc", 5)]))
        [('a.0.b.*.fc', 3), ('a.1.b.*.fc', 5)]
    """
    listed = list(names)
    groups: dict[tuple[str, Hashable], list[int]] = {}
    for position, (name, kind) in enumerate(listed):
        groups.setdefault((star(name), kind), []).append(position)
    numbers = {key: _numbers(listed[position][0] for position in positions) for key, positions in groups.items()}
    patterns = {}
    for (pattern, kind), positions in groups.items():
        together = [own for key, own in numbers.items() if key[0] == pattern]
        words = _words(numbers[pattern, kind], list(zip(*together, strict=True)))
        alone = len(positions) == 1 and len(together) == 1
        shown = listed[positions[0]][0] if alone else pattern.replace("%", "%%").replace("*", "%s") % tuple(words)
        patterns[shown, kind] = positions
    return patterns


def _words(own: list[list[int]], places: list[tuple[list[int], ...]]) -> list[str]:
    """Return a star or numbers for each place of a group; ``places`` has the numbers of all groups of the pattern."""
    apart = [place for place, sets in enumerate(places) if len(set().union(*sets)) == sum(map(len, sets))]
    differ = apart[:1] or [place for place, sets in enumerate(places) if any(each != sets[0] for each in sets)]
    shown = differ if len(places) and len(places[0]) > 1 else []
    return [_listed(values) if place in shown else "*" for place, values in enumerate(own)]


def _numbers(names: Iterable[str]) -> list[list[int]]:
    """Return the numbers at each place of names of one pattern, sorted."""
    places = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    return [sorted(set(map(int, values))) for values in places]


def _listed(values: list[int]) -> str:
    """Return numbers as text: ``3``, ``{0,2}`` or ``{1-5}``."""
    if len(values) == 1:
        return str(values[0])
    whole = len(values) > 2 and values[-1] - values[0] == len(values) - 1
    return f"{{{values[0]}-{values[-1]}}}" if whole else f"{{{','.join(map(str, values))}}}"
