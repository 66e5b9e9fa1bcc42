"""``sweep.yaml``: what was planned, in which order, and what the paper calls it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from randlora_pl.data.catalog.registry import PAPER
from randlora_pl.experiments.sweep.provenance import checked
from randlora_pl.utils.errors import UserError, first_line
from randlora_pl.utils.files.documents import parse_yaml

FILE = "sweep.yaml"
ZERO_SHOT = "zero-shot"
"""The budget of an untrained model."""

FIGURES = {"1": ("11", "12", "13", "14"), "2": ("14",), "3": ("11", "12", "13")}
"""Tables whose averages the paper's figures draw. Figure 2's CLIP towers alone are in no table."""


class Key(NamedTuple):
    """A cell of a table: what its seeds have in common."""

    model: str
    dataset: str
    budget: str
    method: str


@dataclass
class Plan:
    """Plan of a sweep.

    Attributes:
        title: Heading of the report.
        models: Labels, in order; likewise the others.
        seeds: Seeds of every cell.
        paper_names: The paper's name of a label of ours, if it differs, by the label and a model; an empty model
            stands for all of them.
        paper: Tables of the paper to set beside.
        figure: The figure whose tables these are, if one was named.
        families: Model family by label, where one is given.
        restricted: The models of a method that is not for all of them.
        facts: Entries of ``models`` and ``methods`` in the file, by label.
        tuned: Provenance of the rates, as `tune` wrote it; empty if the file has none.
        known: Whether there is a plan: without one nothing can be missing.
    """

    title: str = ""
    models: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    budgets: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    paper_names: dict[tuple[str, str], str] = field(default_factory=dict)
    paper: tuple[str, ...] = ()
    figure: str | None = None
    families: dict[str, str] = field(default_factory=dict)
    restricted: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    known: bool = True

    def paper_name(self, label: str, model: str = "") -> str:
        """Return the paper's name of one of our labels, for a model of ours; the label itself if the file has none."""
        return self.paper_names.get((label, model)) or self.paper_names.get((label, ""), label)

    def untrained(self, method: str) -> bool:
        """Return True if a method is the untrained model, which has no budget."""
        return "".join(letter for letter in method.lower() if letter.isalpha()) in ("zeroshot", "untrained")

    def cells(self) -> Iterator[Key]:
        """Yield the product of models, data sets, budgets and methods; the untrained model once for each data set."""
        for model, dataset in product(self.models, self.datasets):
            methods = [method for method in self.methods if model in self.restricted.get(method, [model])]
            for budget, method in product(self.budgets, methods):
                if budget != ZERO_SHOT and not self.untrained(method):
                    yield Key(model, dataset, budget, method)
            for method in filter(self.untrained, methods):
                yield Key(model, dataset, ZERO_SHOT, method)


def read_plan(folder: Path) -> Plan:
    """Return the plan of a sweep.

    Args:
        folder: The sweep.

    Raises:
        UserError: The file is missing, damaged or does not describe a sweep.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{FILE} is missing: cells that were not run cannot be listed.")
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{FILE} is cut off or damaged ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{FILE} does not describe a sweep.")
    try:
        return _plan(content)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{FILE} does not describe a sweep ({first_line(error)}).") from error


def budget_label(value: Any) -> str:
    """``1`` as ``1-shot``, ``0.5`` and ``50%`` as ``50%``; labels stay as they are."""
    if isinstance(value, float):
        return f"{100 * value:g}%"
    return f"{value}-shot" if isinstance(value, int) or str(value).isdigit() else str(value)


def budget_order(label: str) -> tuple[int, float]:
    """Sort budgets by the amount of data: the untrained model, shots, percent or size, anything else."""
    number, kind = label.rstrip("%k").removesuffix("-shot"), 1 if label.endswith("-shot") else 2
    if label == ZERO_SHOT:
        return 0, 0
    try:
        return kind, float(number)
    except ValueError:
        return 3, 0


def _plan(content: dict[str, Any]) -> Plan:
    names: dict[tuple[str, str], str] = {}
    families: dict[str, str] = {}
    restricted: dict[str, list[str]] = {}

    def labels(part: str) -> list[str]:
        found = content.get(part) or []
        if found == "all":
            return list(PAPER)
        if isinstance(found, str) or not hasattr(found, "__iter__"):
            raise TypeError(f"{part} is {found!r}")
        for label, facts in found.items() if isinstance(found, dict) else ():
            facts = facts if isinstance(facts, dict) else {}
            named = facts.get("paper_name")
            if part == "datasets" and list(facts) == ["dataset"]:  # another label, but the same images
                named = named or facts["dataset"]
            for model, name in named.items() if isinstance(named, dict) else [("", named)] if named else []:
                names[str(label), str(model)] = str(name)
            if part == "models" and facts.get("family"):
                families[str(label)] = str(facts["family"])
            if part == "methods" and facts.get("models"):
                only = facts["models"] if isinstance(facts["models"], list) else [facts["models"]]
                restricted[str(label)] = [str(model) for model in only]
        return [str(label) for label in found]

    paper = content.get("paper") or {}
    if not isinstance(paper, dict):
        paper = {"table": paper}
    figure = str(paper["figure"]) if paper.get("figure") is not None else None
    tables = paper.get("table", paper.get("tables", []))
    numbers = [str(number) for number in (tables if isinstance(tables, list) else [tables])]
    budgets = [budget_label(value) for value in content.get("budgets") or []]
    return Plan(
        title=str(content.get("title") or ""),
        models=labels("models"),
        datasets=labels("datasets"),
        budgets=sorted(dict.fromkeys(budgets), key=budget_order),
        methods=labels("methods"),
        seeds=[int(seed) for seed in content.get("seeds") or [0]],
        paper_names=names,
        paper=tuple(numbers) or FIGURES.get(figure or "", ()),
        figure=figure,
        families=families,
        restricted=restricted,
        facts={part: _facts(content.get(part)) for part in ("models", "methods")},
        tuned=checked(content["tuned"], FILE) if content.get("tuned") else {},
    )


def _facts(part: Any) -> dict[str, dict[str, Any]]:
    items = part.items() if isinstance(part, dict) else ()
    return {str(label): facts if isinstance(facts, dict) else {} for label, facts in items}
