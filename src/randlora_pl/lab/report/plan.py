"""Plan of a sweep: its labels in order, and what the paper calls them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple, Self

import yaml

from randlora_pl.sweep.description import ZERO_SHOT, SweepConfig, is_zero_shot
from randlora_pl.utils.errors import UserError, first_line
from randlora_pl.utils.files.documents import parse_yaml

FILE = "sweep.yaml"

FIGURES = {"1": ["11", "12", "13", "14"], "2": ["14"], "3": ["11", "12", "13"]}
"""Tables whose averages the paper's figures draw. Figure 2's CLIP towers alone are in no table."""


class Key(NamedTuple):
    """A cell of a table: what its seeds have in common."""

    model: str
    dataset: str
    budget: str
    method: str


class ReportPlan(SweepConfig):
    """Description of a sweep, with the labels that only its cells have after the planned ones."""

    @classmethod
    def unknown(cls) -> Self:
        """Return the plan of a sweep without a file, to which the labels of its cells are added."""
        return cls(models={}, methods={}, datasets={}, budgets=[], seeds=[])

    @property
    def figure(self) -> str | None:
        """Return the figure of the paper whose tables these are, if one was named."""
        return None if self.paper.get("figure") is None else str(self.paper["figure"])

    @property
    def tables(self) -> list[str]:
        """Return the tables of the paper to set beside."""
        named = self.paper.get("table", self.paper.get("tables", []))
        numbers = [str(number) for number in (named if isinstance(named, list) else [named])]
        return numbers or FIGURES.get(self.figure or "", [])

    def trains(self, model: str, method: str) -> bool:
        """Return True if the sweep tries a method on a model."""
        return model in (self.methods[method].get("models") or [model])

    def tests(self, first: str, second: str) -> bool:
        """Return True if a pair of methods, in any order, is to be tested."""
        return not self.pairs or [first, second] in self.pairs or [second, first] in self.pairs

    def paper_name(self, label: str, model: str = "") -> str:
        """Return the paper's name of one of our labels, for a model of ours; the label itself if the file has none."""
        for part in (self.methods, self.datasets, self.models):
            facts = part.get(label, {})
            named = facts.get("paper_name")
            if part is self.datasets and list(facts) == ["dataset"]:  # another label, but the same images
                named = named or facts["dataset"]
            names = {str(key): name for key, name in named.items()} if isinstance(named, dict) else {"": named}
            if name := names.get(model) or names.get(""):
                return str(name)
        return label

    def cells(self) -> Iterator[Key]:
        """Yield the product of models, datasets, budgets and methods; the pretrained model once for each dataset."""
        for model, dataset in product(self.models, self.datasets):
            methods = [name for name in self.methods if self.trains(model, name)]
            for budget, method in product(self.budgets, methods):
                if budget != ZERO_SHOT and not is_zero_shot(method):
                    yield Key(model, dataset, budget, method)
            for method in filter(is_zero_shot, methods):
                yield Key(model, dataset, ZERO_SHOT, method)


def read_plan(folder: Path) -> ReportPlan:
    """Return the plan of a sweep.

    Raises:
        UserError: The file is missing, damaged or does not describe a sweep.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{FILE} is missing: cells that were not run cannot be listed.")
    try:
        found = ReportPlan(**vars(SweepConfig.of(parse_yaml(file.read_text(encoding="utf-8")))))
        return replace(found, budgets=sorted(found.budgets, key=budget_order))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{FILE} is cut off or damaged ({first_line(error)}).") from error
    except (TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{FILE} does not describe a sweep ({first_line(error)}).") from error


def budget_order(label: str) -> tuple[int, float]:
    """Sort budgets by the amount of data: the pretrained model, shots, percent or size, anything else."""
    number, kind = label.rstrip("%k").removesuffix("-shot"), 1 if label.endswith("-shot") else 2
    if label == ZERO_SHOT:
        return 0, 0
    try:
        return kind, float(number)
    except ValueError:
        return 3, 0
