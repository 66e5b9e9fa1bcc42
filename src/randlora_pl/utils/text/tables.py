"""Tables as Markdown, and facts as a table of a terminal."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return the lines of a Markdown table.

    pandas' own writer needs another package, and aligns by the type of a column.

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
