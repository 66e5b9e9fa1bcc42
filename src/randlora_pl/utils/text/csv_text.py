"""Tables as CSV text."""

import csv
from collections.abc import Iterable, Sequence

from randlora_pl.utils.text.printable import for_cell


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    r"""Return rows as CSV, each ended by a line feed.

    No cell is a formula for a spreadsheet, and bytes of names that are not UTF-8 are spelled out (``\udcff``).

    Args:
        rows: The cells of each line, the names of the columns first.
    """
    lines: list[str] = []
    csv.writer(_Lines(lines)).writerows([for_cell(c) if isinstance(c, str) else c for c in row] for row in rows)
    return "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


class _Lines:
    r"""Takes the lines of a `csv.writer` and ends them by ``\n``.

    Told to end them so itself, the writer of Python 3.11 leaves a text with a lone carriage return without quotes, and
    whoever reads the file takes that for the end of the line.
    """

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def write(self, line: str) -> None:
        self._lines.append(line.removesuffix("\r\n") + "\n")
