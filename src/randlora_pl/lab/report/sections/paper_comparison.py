"""Printed numbers, of RandLoRA's paper and of others, that belong beside ours, and the footnotes that they need."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from statistics import fmean

from randlora_pl.lab.paper import Note, PaperCell, PaperTable, column_of, notes
from randlora_pl.lab.paper import table as paper_table
from randlora_pl.lab.paper.paper import AVERAGE, is_whole, plain
from randlora_pl.lab.report.document import Printed, Table
from randlora_pl.lab.report.plan import Key, ReportPlan
from randlora_pl.utils.errors import UserError

RELATIVE = "10"
"""The table of times and memory."""
MEASURED = "B.3"
"""The appendix with seconds and gigabytes."""
_TIME, _MEMORY = "training time (% of reference)", "memory (% of reference)"
_RANKS = ("11", "12", "13")
"""Tables whose RandLoRA is the one that Table 10 names without its rank."""


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
        for number in plan.tables:
            try:
                self.tables.append(paper_table(number))
            except UserError as error:
                self.problems.append(str(error))

    def cell(self, key: Key) -> Printed | None:
        """Return the printed number of a cell."""
        column = column_of(self.plan.paper_name(key.dataset))
        for here in self.tables if column else ():
            model, method = self._labels(here, key.model, key.method)
            budgets = {plain(label): label for label in here.budgets}
            found = here.cell(model, method, budgets.get(plain(key.budget), key.budget), column or "")
            if found:
                return _alone(found)
        return None

    def average(self, model: str, budget: str, method: str, datasets: Sequence[str]) -> Printed | None:
        """Return the mean of the printed numbers of the same datasets, None where the paper lacks one of them.

        Where a table or a row has averages over all datasets, or all tests, only: that, None for any others.
        """
        found = [printed.cells[0] for name in datasets if (printed := self.cell(Key(model, name, budget, method)))]
        if found and len(found) == len(datasets):
            return Printed(fmean(cell.value for cell in found), tuple(found), self._printed(found))
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
                return _alone(rows[0])
        return None

    def parameters(self, model: str, method: str) -> str:
        """Return the printed parameters of a method, such as ``1.18 %`` or ``0.7M``; empty where no table has them."""
        for here in self.tables:
            name, label = self._labels(here, model, method)
            for budget in here.budgets:
                if printed := here.parameters(name, label, budget):
                    return printed if printed.endswith("M") else f"{printed} %"
        return ""

    def cost(self, model: str, method: str) -> tuple[Printed | None, Printed | None]:
        """Time and memory of Table 10, percent of full fine-tuning; only where the sweep names the paper at all."""
        if not self.plan.tables:
            return None, None
        here = paper_table(RELATIVE)
        name, label = self._labels(here, model, method)
        for other in map(paper_table, _RANKS):
            there, ranked = self._labels(other, model, method)
            if there == name and ranked in other.methods(there) and ranked.startswith("RandLoRA"):
                label = "RandLoRA"
        found = (here.cell(name, label, "", column) for column in (_TIME, _MEMORY))
        time, memory = (_alone(cell) if cell else None for cell in found)
        return time, memory

    def measured(self, model: str, method: str) -> dict[str, Printed]:
        """Seconds and gigabytes of appendix B.3 by its columns; only where the sweep names Table 5."""
        here = paper_table(MEASURED)
        name, label = self._labels(here, model, method)
        found = here.cells if "5" in self.plan.tables else ()
        return {cell.column: _alone(cell) for cell in found if (cell.model, cell.method) == (name, label)}

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
                if cell.paper and (off := cell.paper.off_by_more_than_rounding()):
                    cell.notes = (self._number(*off),)
        for number, title in enumerate(table.header):
            title.notes = self._notes_of(chain(*(papers[number] for papers in shown)), lambda note: bool(note.column))

    def _notes_of(self, cells: Iterable[PaperCell], where: Callable[[Note], bool]) -> tuple[int, ...]:
        papers = list(dict.fromkeys(cells))
        touched = [note for note in notes() if where(note) and any(map(note.touches, papers))]
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


def _alone(cell: PaperCell) -> Printed:
    return Printed(cell.value, (cell,))


def of_data_sets(here: PaperTable) -> bool:
    """Return True if a table has a column for each dataset."""
    return any(column_of(column) for column in here.columns)


def _names(cell: PaperCell) -> set[str]:
    """Return possible names of a row of Tables 2, 3 and 6: ``RandLoRA ternary``, or with its column or its size.

    Table 6 prints the size of the adapter with the data: ``efficient 15k``.
    """
    size = cell.budget.rpartition(" ")[0]
    return {plain(cell.method), plain(f"{cell.method} {cell.column}"), plain(f"{cell.method} {size}")}
