"""A report before it is printed: sections of text, tables and plots; and its form as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from randlora_pl.lab.paper import PaperCell
from randlora_pl.lab.report.statistics import Crossed, Estimate, formatted, shown
from randlora_pl.utils.text import markdown_table


def many(count: int, word: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count:,} {word}{'s' * (count != 1)}"


@dataclass(frozen=True)
class Printed:
    """Printed number to stand beside one of ours, and the cells that it comes from.

    Attributes:
        printed: The printed average, if it is over the same datasets.
    """

    value: float
    cells: tuple[PaperCell, ...]
    printed: PaperCell | None = None

    def beside(self, ours: float | None) -> str:
        """``paper 51.9 (+1.3)``, or ``published 82.69`` of another paper than RandLoRA's, without a number of ours."""
        cell, alone = self.cells[0], len(self.cells) == 1
        spread = f" ± {cell.std:g}" if alone and cell.std is not None else ""
        difference = "" if ours is None else f" ({formatted(ours - self.value)})"
        shown = percent(self.value) if alone else f"{self.value:.1f}"
        return f"{'published' if cell.source else 'paper'} {shown}{spread}{difference}"


def percent(value: float) -> str:
    """Return a printed number with one decimal, or all that it has."""
    return f"{value:.1f}" if value == round(value, 1) else f"{value:g}"


@dataclass
class TableCell:
    """A cell of a table.

    Attributes:
        below: A second line, such as the paper's value.
        title: Text of the tooltip, such as the value of each seed.
        sort: Sort key of the column; None: its text, or last where the cell has no result.
        best: Marked, because a verdict is in its favour.
        missing: The cell has no result; the text has the reason.
        tint: Colour, from -1 (much lower) over 0 (none) to 1 (much higher).
        paper: Printed numbers that the second line shows.
        notes: Numbers of footnotes.
    """

    text: str
    below: str = ""
    title: str = ""
    sort: float | None = None
    best: bool = False
    missing: bool = False
    tint: float = 0.0
    paper: Printed | None = None
    notes: tuple[int, ...] = ()


def mean_cell(
    estimate: Estimate | Crossed | None, title: str = "", form: str = ".1f", paper: Printed | None = None
) -> TableCell:
    """Return a mean with its interval, and printed numbers and the difference to them below."""
    if estimate is None:
        return missing_cell("not measured", paper=paper)
    below = paper.beside(estimate.mean) if paper else ""
    return TableCell(shown(estimate, form), below, title, estimate.mean, paper=paper)


def missing_cell(why: str, title: str = "", paper: Printed | None = None) -> TableCell:
    """Return a cell without a result, with the reason and printed numbers below."""
    return TableCell(why, paper.beside(None) if paper else "", title, missing=True, paper=paper)


def row(*cells: TableCell | str | int | None) -> list[TableCell]:
    """Return the cells of a row, of which texts and counts may be given as they are; None is an empty cell."""
    counts = (TableCell(f"{cell:,}", sort=cell) if isinstance(cell, int) else cell for cell in cells)
    return [cell if isinstance(cell, TableCell) else TableCell(cell or "") for cell in counts]


@dataclass
class Table:
    """A table.

    Attributes:
        name: An identifier, unique in the report.
        rows: As many cells each as the header; the first one names the row.
        below: Sentences under the table.
        groups: First rows of groups that belong together.
        left: Columns of words, which stand on the left; the others hold numbers.
        notes: Numbers of footnotes to the caption.
    """

    name: str
    caption: str
    header: list[TableCell]
    rows: list[list[TableCell]]
    below: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    left: int = 1
    notes: tuple[int, ...] = ()


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


def markdown(document: Document, folder: str = "figures") -> str:
    """Return the whole report."""
    lines = [f"# {_escape(document.title)}", "", _escape(document.lead), ""]
    for section in document.sections:
        lines += [f"## {_escape(section.title)}", ""]
        lines += [line for text in section.text for line in (_escape(text), "")]
        lines += [f"- {_escape(point)}" for point in section.points] + [""] * bool(section.points)
        lines += ["```sh", *section.commands, "```", ""] if section.commands else []
        for part in section.parts:
            if isinstance(part, Table):
                lines += table_lines(part)
            else:
                alternative = _escape(part.described.replace("[", "(").replace("]", ")"))
                lines += [f"![{alternative}]({folder}/{part.name}.png)", "", _escape(part.caption), ""]
    lines += [f"[^{number}]: {_escape(text)} ({_escape(source)})" for number, text, source in document.footnotes]
    return "\n".join(lines).rstrip() + "\n"


def table_lines(table: Table) -> list[str]:
    """Return a table with its caption and the sentences under it."""
    header, *rows = ([_cell(cell) for cell in row] for row in [table.header, *table.rows])
    caption = f"**{_escape(table.caption)}**{_marks(table.notes)}"
    below = [line for text in table.below for line in (_escape(text), "")]
    return [caption, "", *markdown_table(header, rows, range(table.left)), "", *below]


def _cell(cell: TableCell) -> str:
    text = f"**{_escape(cell.text)}**" if cell.best else _escape(cell.text)
    return f"{text}<br>{_escape(cell.below)}{_marks(cell.notes)}" if cell.below else text + _marks(cell.notes)


def _marks(numbers: Sequence[int]) -> str:
    return "".join(f"[^{number}]" for number in numbers)


def _escape(text: str) -> str:
    for letter in "\\|*_<`[":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())
