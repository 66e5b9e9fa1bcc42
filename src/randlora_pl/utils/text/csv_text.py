"""Tables as CSV text."""

import csv
from collections.abc import Iterable, Sequence

from randlora_pl.utils.text.printable import for_cell


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    r"""Return rows as CSV text with line feeds.

    Cells that look like spreadsheet formulas are escaped, and so are bytes that are not UTF-8 (``\udcff``).

    Args:
        rows: Cells of each row; the first row has the column names.
    """
    lines: list[str] = []
    csv.writer(_Lines(lines)).writerows([for_cell(c) if isinstance(c, str) else c for c in row] for row in rows)
    return "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


class _Lines:
    r"""Stream for a `csv.writer` that ends lines with ``\n``.

    With ``lineterminator="\n"``, the writer of Python 3.11 does not quote a lone carriage return, which readers
    treat as the end of the line.
    """

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def write(self, line: str) -> None:
        self._lines.append(line.removesuffix("\r\n") + "\n")
