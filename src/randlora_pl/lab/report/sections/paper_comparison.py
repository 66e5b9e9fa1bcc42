"""Printed numbers, of RandLoRA's paper and of others, that belong beside ours, and the footnotes that they need."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from randlora_pl.lab.paper import PaperCell, PaperTable, column_of, notes, table
from randlora_pl.lab.paper.paper import AVERAGE, is_whole, plain
from randlora_pl.lab.report.plan import Key, ReportPlan
from randlora_pl.utils.errors import UserError

RELATIVE = "10"
"""The table of times and memory."""
MEASURED = "B.3"
"""The appendix with seconds and gigabytes."""
_TIME, _MEMORY = "training time (% of reference)", "memory (% of reference)"
_RANKS = ("11", "12", "13")
"""Tables whose RandLoRA is the one that Table 10 names without its rank."""


@dataclass(frozen=True)
class PaperAverage:
    """Percent to stand beside an average of ours, and the printed numbers that it comes from.

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
        difference = "" if ours is None else f" ({signed(ours - self.value)})"
        shown = percent(self.value) if alone else f"{self.value:.1f}"
        return f"{'published' if cell.source else 'paper'} {shown}{spread}{difference}"


class Beside:
    """Printed numbers by our labels, and the footnotes that the shown ones need.

    Args:
        plan: The sweep's plan; its ``paper`` names the tables.

    Attributes:
        problems: Tables that are named and not there.
    """

    def __init__(self, plan: ReportPlan) -> None:
        self.plan = plan
        self._notes: dict[tuple[str, str], int] = {}
        self.problems: list[str] = []
        self.tables: list[PaperTable] = []
        for number in plan.paper:
            try:
                self.tables.append(table(number))
            except UserError as error:
                self.problems.append(str(error))

    def cell(self, key: Key) -> PaperCell | None:
        """Return the printed number of a cell."""
        column = column_of(self.plan.paper_name(key.dataset))
        for here in self.tables if column else ():
            model, method = self._labels(here, key.model, key.method)
            budgets = {plain(label): label for label in here.budgets}
            found = here.cell(model, method, budgets.get(plain(key.budget), key.budget), column or "")
            if found:
                return found
        return None

    def average(self, model: str, budget: str, method: str, datasets: Sequence[str]) -> PaperAverage | None:
        """Return the mean of the printed numbers of the same datasets, None where the paper lacks one of them.

        Where a table or a row has averages over all datasets, or all tests, only: that, None for any others.
        """
        cells = [self.cell(Key(model, dataset, budget, method)) for dataset in datasets]
        found = tuple(cell for cell in cells if cell is not None)
        if found and len(found) == len(cells):
            printed = self._printed(found)
            return PaperAverage(fmean(cell.value for cell in found), found, printed)
        columns = [column_of(self.plan.paper_name(dataset)) for dataset in datasets]
        for here in self.tables:
            name, label = self._labels(here, model, method)
            rows: list[PaperCell] = []
            if of_data_sets(here):
                alone = here.cell(name, label, budget, AVERAGE)
                rows = [alone] if alone and not found and here.averaged == {*columns} else []
            elif is_whole(columns):
                of_budget = [c for c in here.cells if c.model == name and c.budget.rpartition(" ")[2] == budget]
                rows = [c for c in of_budget if plain(label) in _names(c)]
            if len(rows) == 1:  # a method with several columns must be named with one of them
                return PaperAverage(rows[0].value, (rows[0],))
        return None

    def parameters(self, model: str, method: str) -> str:
        """Return the printed parameters of a method, such as ``1.18 %`` or ``0.7M``; empty where no table has them."""
        for here in self.tables:
            name, label = self._labels(here, model, method)
            for budget in here.budgets:
                if printed := here.parameters(name, label, budget):
                    return printed if printed.endswith("M") else f"{printed} %"
        return ""

    def cost(self, model: str, method: str) -> tuple[PaperCell | None, PaperCell | None]:
        """Time and memory of Table 10, percent of full fine-tuning; only where the sweep names the paper at all."""
        if not self.plan.paper:
            return None, None
        here = table(RELATIVE)
        name, label = self._labels(here, model, method)
        for other in map(table, _RANKS):
            there, ranked = self._labels(other, model, method)
            if there == name and ranked in other.methods(there) and ranked.startswith("RandLoRA"):
                label = "RandLoRA"
        return here.cell(name, label, "", _TIME), here.cell(name, label, "", _MEMORY)

    def measured(self, model: str, method: str) -> dict[str, PaperCell]:
        """Seconds and gigabytes of appendix B.3 by its columns; only where the sweep names Table 5."""
        here = table(MEASURED)
        name, label = self._labels(here, model, method)
        found = here.cells if "5" in self.plan.paper else ()
        return {cell.column: cell for cell in found if (cell.model, cell.method) == (name, label)}

    @property
    def footnotes(self) -> list[tuple[int, str, str]]:
        """Return number, text and source of every note, in the order in which they were first needed."""
        return [(number, *content) for content, number in self._notes.items()]

    def caption_notes(self, cells: Iterable[PaperCell]) -> tuple[int, ...]:
        """Return the notes about whole tables that some shown numbers are from."""
        return self._notes_of(cells, lambda method, column: not method and not column)

    def row_notes(self, cells: Iterable[PaperCell]) -> tuple[int, ...]:
        """Return the notes about the method of some shown numbers, and their sources."""
        shown = list(cells)
        about = self._notes_of(shown, lambda method, column: bool(method) and not column)
        sources = {
            self._number(f"Published accuracies of {cell.method}.", cell.source) for cell in shown if cell.source
        }
        return tuple(sorted({*about, *sources}))

    def column_notes(self, cells: Iterable[PaperCell]) -> tuple[int, ...]:
        """Return the notes about the dataset, or the column, of some shown numbers."""
        return self._notes_of(cells, lambda method, column: bool(column))

    def average_notes(self, found: PaperAverage) -> tuple[int, ...]:
        """Return a note where the printed average is not the mean of the printed cells."""
        if found.printed is None or abs(found.printed.value - found.value) <= 0.05 + 1e-9:
            return ()
        cell = found.printed
        text = f"Printed average of {cell.method}, {cell.budget}: {cell.value:g}; the mean of its printed cells is "
        return (self._number(f"{text}{found.value:.2f}, which is used here.", f"Table {cell.table}, recomputed"),)

    def _notes_of(self, cells: Iterable[PaperCell], where: Callable[[str, str], bool]) -> tuple[int, ...]:
        shown = list(cells)
        touched = [n for n in notes() if where(n.method, n.column) and any(map(n.touches, shown))]
        return tuple(sorted(self._number(note.text, note.source) for note in touched))

    def _number(self, text: str, source: str) -> int:
        return self._notes.setdefault((text, source), len(self._notes) + 1)

    def _printed(self, cells: Sequence[PaperCell]) -> PaperCell | None:
        first = cells[0]
        here = next(found for found in self.tables if found.number == first.table)
        if {cell.column for cell in cells} != here.averaged:
            return None
        return here.cell(first.model, first.method, first.budget, AVERAGE)

    def _labels(self, here: PaperTable, model: str, method: str) -> tuple[str, str]:
        """Return our labels as this table spells them, or ours if no label matches up to punctuation.

        A method that the paper calls by several names may be labelled with one and have another as its ``paper_name``.
        """
        named, name = self.plan.paper_name(method, model), self.plan.paper_name(model)
        models = {plain(label): label for label in here.models}
        name = models.get(plain(name), name)
        methods = {plain(label): label for label in here.methods(name)}
        return name, methods.get(plain(named)) or (methods.get(plain(method), named) if of_data_sets(here) else named)


def percent(value: float) -> str:
    """Return a printed number with one decimal, or all that it has."""
    return f"{value:.1f}" if value == round(value, 1) else f"{value:g}"


def signed(difference: float) -> str:
    """``+1.3``, never ``-0.0``."""
    return f"{round(difference, 1) + 0.0:+.1f}"


def of_data_sets(here: PaperTable) -> bool:
    """Return True if a table has a column for each dataset."""
    return any(column_of(column) for column in here.columns)


def _names(cell: PaperCell) -> set[str]:
    """Return possible names of a row of Tables 2, 3 and 6: ``RandLoRA ternary``, or with its column or its size.

    Table 6 prints the size of the adapter with the data: ``efficient 15k``.
    """
    size = cell.budget.rpartition(" ")[0]
    return {plain(cell.method), plain(f"{cell.method} {cell.column}"), plain(f"{cell.method} {size}")}
