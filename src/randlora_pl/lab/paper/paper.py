"""Cells of the paper's tables, and of other papers on prompts, by (table, model, method, budget, column)."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from randlora_pl.data.catalog.registry import PAPER
from randlora_pl.utils.errors import UserError

SOURCE = (
    "Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad: RandLoRA: Full-Rank "
    "Parameter-Efficient Fine-Tuning of Large Models, ICLR 2025"
)

AVERAGE = "Average"
"""The column of printed averages."""
FURTHER = ("4", "15", "shifted_datasets")
"""Tables with columns beside the datasets of Table 7: tests of language models, and shifted images."""


@dataclass(frozen=True)
class PaperCell:
    """One printed number: accuracy in percent (Table 10: percent of the reference), and its standard deviation if any.

    Attributes:
        method: Label of the method, with its rank as printed.
        budget: ``1-shot`` ... ``16-shot``, ``50%``, ``100%``; other words for language models. ``16-shot new``: the new
            classes of training on half of them.
        params: The printed parameters of Tables 4 and 15, empty elsewhere.
        column: A dataset, `AVERAGE`, or a column that Tables 2, 3 and 10 present in another way.
        source: Paper that published it; empty for the tables of RandLoRA's paper.
    """

    table: str
    model: str
    method: str
    budget: str
    params: str
    column: str
    value: float
    std: float | None
    source: str = ""


class PaperTable:
    """One table, its cells in the printed order.

    Attributes:
        own: It is of RandLoRA's paper.
    """

    def __init__(self, number: str, cells: Sequence[PaperCell]) -> None:
        self.number = number
        self.cells = tuple(cells)
        self.own = not any(cell.source for cell in cells)
        self._by_place = {(cell.model, cell.method, cell.budget, cell.column): cell for cell in cells}

    @property
    def models(self) -> tuple[str, ...]:
        """Labels of the models, in order."""
        return tuple(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def budgets(self) -> tuple[str, ...]:
        """Data budgets, in order."""
        return tuple(dict.fromkeys(cell.budget for cell in self.cells))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns, in order."""
        return tuple(dict.fromkeys(cell.column for cell in self.cells))

    @property
    def averaged(self) -> set[str]:
        """Return the columns of which `AVERAGE` is the mean."""
        return {*self.columns} - {AVERAGE}

    def methods(self, model: str | None = None) -> tuple[str, ...]:
        """Return the labels of the methods of one model, or of all."""
        return tuple(dict.fromkeys(cell.method for cell in self.cells if model in (None, cell.model)))

    def cell(self, model: str, method: str, budget: str, column: str) -> PaperCell | None:
        """Return a cell by its exact labels; None where the table has none."""
        return self._by_place.get((model, method, budget, column))

    def value(self, model: str, method: str, budget: str, column: str) -> float | None:
        """Return the printed number, None where the table has none."""
        cell = self.cell(model, method, budget, column)
        return cell.value if cell else None

    def parameters(self, model: str, method: str, budget: str) -> str:
        """Return the printed parameters (percent in Table 15, a number in Table 4), or "" without such a column."""
        found = (c.params for c in self.cells if (c.model, c.method, c.budget) == (model, method, budget))
        return next(found, "")


@cache
def _tables() -> dict[str, PaperTable]:
    cells: dict[str, list[PaperCell]] = {}
    for row in [*_rows("tables.csv"), *_rows("published.csv")]:
        value, std = float(row.pop("value")), row.pop("std", "")
        cell = PaperCell(**{"params": "", **row}, value=value, std=float(std) if std else None)
        cells.setdefault(cell.table, []).append(cell)
    return {number: PaperTable(number, found) for number, found in cells.items()}


def _rows(name: str) -> list[dict[str, str]]:
    text = (files(__package__) / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def numbers() -> tuple[str, ...]:
    """Return the numbers and names of the tables that are here."""
    return tuple(sorted(_tables(), key=lambda number: number.zfill(2)))


def table(number: int | str) -> PaperTable:
    """Return a table by its number; a UserError lists those that are here."""
    known = _tables()
    if str(number) not in known:
        raise UserError(f"The numbers of the paper's Table {number} are not here. Known: {', '.join(numbers())}.")
    return known[str(number)]


@cache
def datasets() -> dict[str, dict[str, int]]:
    """Table 7 by the paper's name: classes, images of train, val and test, epochs."""
    return {row.pop("dataset"): {key: int(value) for key, value in row.items()} for row in _rows("datasets.csv")}


def column_of(dataset: str) -> str | None:
    """Return the paper's name of a dataset or test, None where the paper does not have it.

    Args:
        dataset: A name of our catalog (``oxfordpets``, ``stsb``) or the paper's own (``OxfordIIITPet``, ``STS-B``).
    """
    ours = dict(zip(PAPER, datasets(), strict=True))  # both are in the order of Table 7
    further = [column for number in FURTHER for column in table(number).averaged]
    same = {plain(name): name for name in [*datasets(), *further]}
    return ours.get(dataset) or same.get(plain(dataset))


def is_whole(columns: Iterable[str | None]) -> bool:
    """Return True if these are what Tables 2, 3 and 6 average over: all datasets of Table 7, or all tests of Table 15.

    Args:
        columns: The paper's names, each once; None for what the paper does not have.
    """
    given = list(columns)
    wholes = ({*datasets()}, table(15).averaged)
    return any(set(given) == whole and len(given) == len(whole) for whole in wholes)


def plain(label: str) -> str:
    """Return a label for comparison: ``RandLoRA-6`` and ``RandLoRA6`` are the same."""
    return re.sub(r"[^a-z0-9]", "", label.lower())
