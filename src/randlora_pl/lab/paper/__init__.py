"""The paper's own numbers, as data with their source. See ``README.md`` next to this file."""

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import yaml
from pandas import DataFrame

from randlora_pl.data.catalog import PAPER
from randlora_pl.utils.errors import UserError

SOURCE = (
    "Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad: RandLoRA: Full-Rank "
    "Parameter-Efficient Fine-Tuning of Large Models, ICLR 2025"
)

AVERAGE = "Average"
"""The column of printed averages."""


class PaperCell(NamedTuple):
    """One printed number: accuracy in percent (Table 10: percent of the reference), and its standard deviation if any.

    Attributes:
        method: Label of the method, with its rank as printed.
        budget: ``1-shot`` ... ``16-shot``, ``50%``, ``100%``; other words for language models. ``16-shot new``: the new
            classes of training on half of them.
        params: The printed parameters of Tables 4 (a number) and 15 (percent), empty elsewhere.
        column: A dataset, `AVERAGE`, or a column that Tables 2, 3 and 10 present in another way.
        source: Paper that published it; empty for the tables of RandLoRA's paper.
    """

    table: str
    model: str
    method: str
    budget: str
    column: str
    value: float
    params: str = ""
    std: float | None = None
    source: str = ""


@cache
def _tables() -> dict[str, tuple[PaperCell, ...]]:
    tables: dict[str, list[PaperCell]] = {}
    for row in [*rows("tables.csv"), *rows("published.csv")]:
        value, std = float(row.pop("value")), row.pop("std", "")
        cell = PaperCell(**row, value=value, std=float(std) if std else None)
        tables.setdefault(cell.table, []).append(cell)
    return {number: tuple(cells) for number, cells in tables.items()}


def rows(name: str) -> list[dict[str, str]]:
    """Return the rows of a file of this folder by the titles of its columns."""
    text = (files(__package__) / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def numbers() -> tuple[str, ...]:
    """Return the numbers and names of the tables that are here."""
    return tuple(sorted(_tables(), key=lambda number: number.zfill(2)))


def cells(number: int | str) -> tuple[PaperCell, ...]:
    """Return the cells of a table in the printed order; a UserError lists the tables that are here."""
    if str(number) not in _tables():
        raise UserError(f"The numbers of the paper's Table {number} are not here. Known: {', '.join(numbers())}.")
    return _tables()[str(number)]


def table(number: int | str) -> DataFrame:
    """Return a table as one of pandas, a row for each printed number with the fields of `PaperCell`."""
    return DataFrame(cells(number))


@cache
def averaged(number: int | str) -> set[str]:
    """Return the columns of a table of which `AVERAGE` is the mean."""
    return {cell.column for cell in cells(number)} - {AVERAGE}


@cache
def datasets() -> dict[str, dict[str, int]]:
    """Table 7 by the paper's name: classes, images of train, val and test, epochs."""
    return {row.pop("dataset"): {key: int(value) for key, value in row.items()} for row in rows("datasets.csv")}


@cache
def column_of(dataset: str) -> str | None:
    """Return the paper's name of a dataset or test, None where the paper does not have it.

    Args:
        dataset: A name of our catalog (``oxfordpets``, ``stsb``) or the paper's own (``OxfordIIITPet``, ``STS-B``).
    """
    ours = dict(zip(PAPER, datasets(), strict=True))  # both are in the order of Table 7
    # columns besides the datasets of Table 7: tests of language models, and shifted images
    further = [column for number in ("4", "15", "shifted_datasets") for column in averaged(number)]
    same = {plain(name): name for name in [*datasets(), *further]}
    return ours.get(dataset) or same.get(plain(dataset))


def plain(label: str) -> str:
    """Return a label for comparison: ``RandLoRA-6`` and ``RandLoRA6`` are the same."""
    return re.sub(r"[^a-z0-9]", "", label.lower())


@dataclass(frozen=True)
class Note:
    """One inconsistency.

    Attributes:
        model, method, budget, column: Regular expressions that a whole label must match; empty: any.
    """

    key: str
    text: str
    source: str
    tables: tuple[str, ...]
    model: str = ""
    method: str = ""
    budget: str = ""
    column: str = ""

    def touches(self, cell: PaperCell) -> bool:
        """Return True if it is about this number."""
        labels = ("model", "method", "budget", "column")
        pairs = [(getattr(self, name), getattr(cell, name)) for name in labels]
        return cell.table in self.tables and all(not want or re.fullmatch(want, have) for want, have in pairs)


@cache
def notes() -> tuple[Note, ...]:
    """Return all notes, in the order in which a report numbers them."""
    content = yaml.safe_load((files(__package__) / "notes.yaml").read_text(encoding="utf-8"))
    return tuple(
        Note(key=key, **{**facts, "tables": tuple(str(number) for number in facts["tables"])})
        for key, facts in content.items()
    )


__all__ = ["SOURCE", "Note", "PaperCell", "cells", "column_of", "datasets", "notes", "numbers", "table"]

_BOTH_TOWERS = {"FullFineTuning": 1e-5, "LoRA": 1e-3, "NoLA": 1e-3, "VeRA": 1e-2, "RandLoRA": 1e-3}
_IMAGE_TOWER = _BOTH_TOWERS | {"LoRA": 1e-2, "RandLoRA": 1e-2}
_IMAGES = {"VisionLanguageTask": _BOTH_TOWERS, "TextHeadTask": _IMAGE_TOWER, "LinearHeadTask": _IMAGE_TOWER}
_IMAGES |= {"PromptTask": {}}  # another loss
_TEXTS = {"LoRA": (1e-4,), "DoRA": (1e-4,), "NoLA": (1e-4,), "RandLoRA": (1e-4,), "VeRA": (1e-4, 1e-2)}


def paper_rates(method: str, task: str) -> tuple[float, ...]:
    """Return the rates that the paper has for a method, several if table and script differ; empty if it has none.

    An unknown task is taken to be on texts.
    """
    if task in _IMAGES:
        return (_IMAGES[task][method],) if method in _IMAGES[task] else ()
    return _TEXTS.get(method, ())
