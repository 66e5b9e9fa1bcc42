"""Known inconsistencies of the paper's numbers; each note names the numbers it affects."""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from randlora_pl.lab.paper.paper import PaperCell


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
