"""The report as Markdown, with footnotes as GitHub knows them."""

from collections.abc import Sequence

from randlora_pl.lab.report.document import Document, Picture, Table, TableCell
from randlora_pl.utils.text.tables import markdown_table


def markdown(document: Document, folder: str = "figures") -> str:
    """Return the whole report."""
    lines = [f"# {_escape(document.title)}", "", _escape(document.lead), ""]
    for section in document.sections:
        lines += [f"## {_escape(section.title)}", ""]
        for text in section.text:
            lines += [_escape(text), ""]
        lines += [f"- {_escape(point)}" for point in section.points] + [""] * bool(section.points)
        lines += ["```sh", *section.commands, "```", ""] if section.commands else []
        for part in section.parts:
            lines += table_lines(part) if isinstance(part, Table) else _picture(part, folder)
    lines += [f"[^{number}]: {_escape(text)} ({_escape(source)})" for number, text, source in document.footnotes]
    return "\n".join(lines).rstrip() + "\n"


def table_lines(table: Table) -> list[str]:
    """Return a table with its caption and the sentences under it."""
    header, *rows = ([_cell(cell) for cell in row] for row in [table.header, *table.rows])
    caption = f"**{_escape(table.caption)}**{_marks(table.notes)}"
    lines = [caption, "", *markdown_table(header, rows, range(table.left)), ""]
    for text in table.below:
        lines += [_escape(text), ""]
    return lines


def _cell(cell: TableCell) -> str:
    text = f"**{_escape(cell.text)}**" if cell.best else _escape(cell.text)
    return f"{text}<br>{_escape(cell.below)}{_marks(cell.notes)}" if cell.below else text + _marks(cell.notes)


def _picture(picture: Picture, folder: str) -> list[str]:
    alternative = _escape(picture.described.replace("[", "(").replace("]", ")"))
    return [f"![{alternative}]({folder}/{picture.name}.png)", "", _escape(picture.caption), ""]


def _marks(numbers: Sequence[int]) -> str:
    return "".join(f"[^{number}]" for number in numbers)


def _escape(text: str) -> str:
    for letter in "\\|*_<`[":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())
