"""Printed numbers, of RandLoRA's paper and of others, that belong beside ours, and the footnotes that they need."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain
from statistics import fmean

from randlora_pl.lab.paper import AVERAGE, Note, PaperCell, averaged, cells, column_of, notes, numbers, plain
from randlora_pl.lab.paper import datasets as table_7
from randlora_pl.lab.report.cells import Key, ReportPlan
from randlora_pl.lab.report.document import Printed, Table

RELATIVE = "10"
"""The table of times and memory."""


class Beside:
    """Printed numbers by our labels, and the footnotes that the shown ones need.

    Args:
        plan: The sweep's plan; its ``paper`` names the tables.

    Attributes:
        tables: The tables that are here.
        problems: A sentence for each table that is named and not there.
    """

    def __init__(self, plan: ReportPlan) -> None:
        self.plan = plan
        self.tables = [number for number in plan.tables if number in numbers()]
        known = f"is not here. Known: {', '.join(numbers())}."
        self.problems = [f"Table {number} {known}" for number in plan.tables if number not in self.tables]
        self._notes: dict[tuple[str, str], int] = {}
        self._rows = cache(self._found_rows)

    def _of_model(self, number: str, model: str) -> list[PaperCell]:
        """Return the cells of a table for one of our models, whose name is equal up to punctuation."""
        name = plain(self.plan.paper_name(model))
        return [cell for cell in cells(number) if plain(cell.model) == name]

    def _found_rows(self, number: str, model: str, method: str) -> list[PaperCell]:
        """Return the cells of a table for one of our methods.

        A method that the paper calls by several names may be labelled with one and have another as its ``paper_name``.
        """
        here = self._of_model(number, model)
        named = [cell for cell in here if plain(cell.method) == plain(self.plan.paper_name(method, model))]
        return named or [cell for cell in here if plain(cell.method) == plain(method) and of_data_sets(number)]

    def cell(self, key: Key) -> Printed | None:
        """Return the printed number of a cell."""
        column = column_of(self.plan.paper_name(key.dataset))
        for number in self.tables if column else ():
            for cell in self._rows(number, key.model, key.method):
                if cell.column == column and plain(cell.budget) == plain(key.budget):
                    return _alone(cell)
        return None

    def average(self, model: str, budget: str, method: str, datasets: Sequence[str]) -> Printed | None:
        """Return the mean of the printed numbers of the same datasets, None where the paper lacks one of them.

        Where a table or a row has averages over all datasets, or all tests, only: that, None for any others.
        """
        found = [printed.cells[0] for name in datasets if (printed := self.cell(Key(model, name, budget, method)))]
        columns = [column_of(self.plan.paper_name(dataset)) for dataset in datasets]
        if found and len(found) == len(datasets):
            first, whole = found[0], {*columns} == averaged(found[0].table)
            same = [cell for cell in self._rows(first.table, model, method) if cell.budget == first.budget]
            printed_mean = next((cell for cell in same if whole and cell.column == AVERAGE), None)
            return Printed(fmean(cell.value for cell in found), tuple(found), printed_mean)
        # Tables 2, 3 and 6 average over all datasets of Table 7, or over all tests of Table 15
        every = any(sorted(map(str, columns)) == sorted(names) for names in (table_7(), averaged(15)))
        for number in self.tables:
            rows: list[PaperCell] = []
            if of_data_sets(number):
                if not found and averaged(number) == {*columns}:
                    of_method = self._rows(number, model, method)
                    rows = [cell for cell in of_method if (cell.budget, cell.column) == (budget, AVERAGE)]
            elif every:
                # ``RandLoRA ternary`` names a method with its column, and Table 6 prints the size of the adapter with
                # the data: ``efficient 15k``
                name = plain(self.plan.paper_name(method, model))
                for cell in self._of_model(number, model):
                    size, _, data = cell.budget.rpartition(" ")
                    if data == budget and name in (plain(f"{cell.method} {more}") for more in ("", cell.column, size)):
                        rows.append(cell)
            if len(rows) == 1:  # a method with several columns must be named with one of them
                return _alone(rows[0])
        return None

    def parameters(self, model: str, method: str) -> str:
        """Return the printed parameters of a method, such as ``1.18 %`` or ``0.7M``; empty where no table has them."""
        printed = (cell.params for number in self.tables for cell in self._rows(number, model, method) if cell.params)
        found = next(printed, "")
        return found if found.endswith("M") or not found else f"{found} %"

    def cost(self, model: str, method: str) -> tuple[Printed | None, Printed | None]:
        """Time and memory of Table 10, percent of full fine-tuning; only where the sweep names the paper at all."""
        if not self.plan.tables:
            return None, None
        rows = self._rows(RELATIVE, model, method)
        # whose RandLoRA is the one that Table 10 names without its rank
        ranked = [cell for number in ("11", "12", "13") for cell in self._rows(number, model, method)]
        if any(cell.method.startswith("RandLoRA") for cell in ranked):
            rows = [cell for cell in self._of_model(RELATIVE, model) if cell.method == "RandLoRA"]
        printed = {cell.column: _alone(cell) for cell in rows}
        return printed.get("training time (% of reference)"), printed.get("memory (% of reference)")

    def measured(self, model: str, method: str) -> dict[str, Printed]:
        """Seconds and gigabytes of appendix B.3 by its columns; only where the sweep names Table 5."""
        rows = self._rows("B.3", model, method) if "5" in self.plan.tables else []
        return {cell.column: _alone(cell) for cell in rows}

    @property
    def footnotes(self) -> list[tuple[int, str, str]]:
        """Return number, text and source of every note, in the order in which they were first needed."""
        return [(number, *content) for content, number in self._notes.items()]

    def annotate(self, table: Table) -> None:
        """Add the numbers of the notes to the printed numbers of a table.

        The caption has the notes about a whole table of the paper, the first cell of a row those about its method and
        its source, and the title of a column those about its dataset.
        """
        shown = [[cell.paper.cells if cell.paper else () for cell in row] for row in table.rows]
        table.notes = self._notes_of(chain(*chain(*shown)), lambda note: not note.method and not note.column)
        for row, papers in zip(table.rows, shown, strict=True):
            sources = {self._number(f"Published accuracies of {cell.method}.", cell.source)
                       for cell in chain(*papers) if cell.source}  # fmt: skip
            about = self._notes_of(chain(*papers), lambda note: bool(note.method) and not note.column)
            row[0].notes = tuple(sorted({*about, *sources}))
            for cell in row:
                printed = cell.paper and cell.paper.printed
                if cell.paper and printed and abs(printed.value - cell.paper.value) > 0.05 + 1e-9:  # not by rounding
                    text = f"Printed average of {printed.method}, {printed.budget}: {printed.value:g}; the mean of its "
                    text += f"printed cells is {cell.paper.value:.2f}, which is used here."
                    cell.notes = (self._number(text, f"Table {printed.table}, recomputed"),)
        for number, title in enumerate(table.header):
            title.notes = self._notes_of(chain(*(papers[number] for papers in shown)), lambda note: bool(note.column))

    def _notes_of(self, cells: Iterable[PaperCell], where: Callable[[Note], bool]) -> tuple[int, ...]:
        papers = list(dict.fromkeys(cells))
        touched = [note for note in notes() if where(note) and any(map(note.touches, papers))]
        return tuple(sorted(self._number(note.text, note.source) for note in touched))

    def _number(self, text: str, source: str) -> int:
        return self._notes.setdefault((text, source), len(self._notes) + 1)


def _alone(cell: PaperCell) -> Printed:
    return Printed(cell.value, (cell,))


@cache
def of_data_sets(number: str) -> bool:
    """Return True if a table has a column for each dataset."""
    return any(map(column_of, averaged(number)))
