"""The learning rate of each method, and how it was chosen: what makes two methods comparable."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from randlora_pl.lab.paper.rates import paper_rates
from randlora_pl.lab.report.document import Table, TableCell, row
from randlora_pl.lab.report.results import Results
from randlora_pl.lab.report.runs import FinishedRun
from randlora_pl.run.options.validate import rate_name
from randlora_pl.sweep.description import is_zero_shot
from randlora_pl.sweep.provenance import chosen_for, rule_of

PAPER, VALIDATION, TYPED, DEFAULT = "paper", "validation", "typed", "default"
"""How a rate was chosen. The first two are rules; the others are not tuned."""

_MEANINGS = {
    PAPER: "paper: the paper's rate for the method.",
    VALIDATION: "validation: the best rate that randlora-pl tune tried on validation samples.",
    TYPED: "typed: set by hand in the sweep, not tuned.",
    DEFAULT: "default: the default rate of the method, not tuned.",
}


@dataclass(frozen=True)
class Rate:
    """One learning rate, None if no run has it, and one of the words above.

    Attributes:
        rule: Equal for rates that were chosen in one way; empty where a rate is not tuned.
    """

    value: float | None
    how: str
    rule: str = ""

    @property
    def shown(self) -> str:
        """Text of the rate in a table."""
        return "unknown" if self.value is None else f"{self.value:g}"


class Rates:
    """The rates of a sweep."""

    def __init__(self, results: Results) -> None:
        self.results, self.plan = results, results.plan
        self._found: dict[tuple[str, str], dict[Rate, list[FinishedRun]]] = {}
        for run in results.sweep.finished:
            if not is_zero_shot(run.key.method):
                by_rate = self._found.setdefault((run.key.model, run.key.method), {})
                by_rate.setdefault(self.rate(run), []).append(run)

    def of(self, model: str, method: str) -> dict[Rate, list[FinishedRun]]:
        """Return the rates of a method, each with its runs."""
        return self._found.get((model, method), {})

    def untuned(self, model: str, methods: Iterable[str]) -> str:
        """Why methods cannot be compared, such as ``LoRA default, RandLoRA-6 typed``; empty where they can be."""
        rates = {method: self.of(model, method) for method in methods}
        rules = {rate.rule for found in rates.values() for rate in found}
        if len(rules) == 1 and "" not in rules:
            return ""
        hows = {method: " and ".join(dict.fromkeys(rate.how for rate in found)) for method, found in rates.items()}
        other = ", but of several searches" if set(hows.values()) == {VALIDATION} else ""
        return ", ".join(f"{method} {how}" for method, how in hows.items()) + other

    def rate(self, run: FinishedRun) -> Rate:
        """Return the rate of a trained run."""
        model, label = run.key.model, run.key.method
        method = self.plan.fact("methods", label)
        kind, task = str(run.facts.get("method") or ""), str(run.facts.get("task") or "VisionLanguageTask")
        only_head = "head_learning_rate" in method and "learning_rate" not in method
        name = "head_learning_rate" if only_head else rate_name(kind, task)
        typed = run.typed.get(name, method.get(name))
        value = typed if isinstance(typed, int | float) else run.number(name)
        chosen = chosen_for(self.plan.tuned, self.plan.fact("models", model), label, method)
        if name in chosen and value is not None and math.isclose(value, chosen[name]):
            return Rate(value, VALIDATION, rule_of(self.plan.tuned))
        paper = paper_rates(kind, task) if self.plan.paper or self.plan.figure else ()
        if paper and (value is None or any(math.isclose(value, rate) for rate in paper)):
            return Rate(value, PAPER, PAPER)
        return Rate(value, DEFAULT if typed is None else TYPED)


def rate_table(rates: Rates) -> Table | None:
    """Return the rates of every method, with the cells of each if there are several; None if nothing was trained."""
    rows, hows = [], set()
    for model in rates.plan.models:
        for method in rates.plan.methods:
            found = rates.of(model, method)
            for rate, runs in found.items():
                hows.add(rate.how)
                groups = dict.fromkeys(f"{run.key.dataset} {run.key.budget}" for run in runs)
                where = "everywhere" if len(found) == 1 else ", ".join(groups)
                rows.append(row(method, model, rate.how, where, TableCell(rate.shown, sort=rate.value)))
    if not rows:
        return None
    below = [meaning for how, meaning in _MEANINGS.items() if how in hows]
    if VALIDATION in hows:
        below.append(_searched(rates))
    header = row("Method", "Model", "Chosen by", "Where", "Learning rate")
    return Table("rates-methods", "Learning rates and how they were chosen", header, rows, below=below, left=4)


def _searched(rates: Rates) -> str:
    """Return the grid and the rule of the search."""
    found = rates.plan.tuned
    names = {name: ", ".join(map(str, found.get(name) or ["?"])) for name in ("datasets", "budgets", "seeds")}
    made = " ".join(str(found[name])[:12] for name in ("version", "git_commit") if found.get(name))
    by = f", by randlora-pl {made}" if made else ""
    return (
        f"The search: {found.get('monitor', 'val/acc')} on {names['datasets']} at {names['budgets']}, seeds "
        f"{names['seeds']}{by}. One rate for all datasets and budgets."
    )
