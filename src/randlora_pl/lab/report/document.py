"""A report before it is printed: sections of text, tables and plots, the same for Markdown and HTML."""

from dataclasses import dataclass, field


def many(count: int, word: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count:,} {word}{'s' * (count != 1)}"


@dataclass(frozen=True)
class TableCell:
    """A cell of a table.

    Attributes:
        below: A second line, such as the paper's value.
        title: Text of the tooltip, such as the value of each seed.
        sort: Sort key of the column; None: its text, or last where the cell has no result.
        best: Marked, because a verdict is in its favour.
        missing: The cell has no result; the text has the reason.
        notes: Numbers of footnotes.
        tint: Colour, from -1 (much lower) over 0 (none) to 1 (much higher).
    """

    text: str
    below: str = ""
    title: str = ""
    sort: float | None = None
    best: bool = False
    missing: bool = False
    notes: tuple[int, ...] = ()
    tint: float = 0.0


def row(*cells: TableCell | str | int | None) -> list[TableCell]:
    """Return the cells of a row, of which texts and counts may be given as they are; None is an empty cell."""
    return [cell if isinstance(cell, TableCell) else _plain(cell) for cell in cells]


def _plain(value: str | int | None) -> TableCell:
    return TableCell(f"{value:,}", sort=value) if isinstance(value, int) else TableCell(value or "")


@dataclass
class Table:
    """A table.

    Attributes:
        name: An identifier, unique in the report.
        rows: As many cells each as the header; the first one names the row.
        groups: First rows of groups that belong together.
        notes: Numbers of footnotes to the caption.
        below: Sentences under the table.
        left: Columns of words, which stand on the left; the others hold numbers.
    """

    name: str
    caption: str
    header: list[TableCell]
    rows: list[list[TableCell]]
    groups: list[int] = field(default_factory=list)
    notes: tuple[int, ...] = ()
    below: list[str] = field(default_factory=list)
    left: int = 1


@dataclass
class Picture:
    """A plot.

    Attributes:
        name: Name of its files, without an ending.
        caption: Content of the picture, and its data.
        described: Text alternative of the picture for screen readers.
    """

    name: str
    caption: str
    described: str
    figure: object


@dataclass
class Section:
    """A part with a heading: paragraphs, short statements, commands for a shell, then tables and plots in order."""

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    parts: list[Table | Picture] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


@dataclass
class Document:
    """A whole report: a heading with one line below it, sections, and number, text and source of each footnote."""

    title: str
    lead: str
    sections: list[Section]
    footnotes: list[tuple[int, str, str]]
