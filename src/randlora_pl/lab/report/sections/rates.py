"""The learning rate of each method, and how it was chosen: what makes two methods comparable."""

from collections.abc import Sequence

from pandas import isna

from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.collect import DEFAULT, PAPER, TYPED, VALIDATION
from randlora_pl.lab.report.document import Table, TableCell, row

_MEANINGS = {
    PAPER: "paper: the paper's rate for the method.",
    VALIDATION: "validation: the best rate that randlora-pl tune tried on validation samples.",
    TYPED: "typed: set by hand in the sweep, not tuned.",
    DEFAULT: "default: the default rate of the method, not tuned.",
}


def untuned(sweep: Sweep, model: str, methods: Sequence[str]) -> str:
    """Why methods cannot be compared, such as ``LoRA default, RandLoRA-6 typed``; empty where they can be."""
    runs = {method: sweep.of(model=model, method=method) for method in methods}
    rules = {rule for found in runs.values() for rule in found["rate_rule"]}
    if len(rules) == 1 and "" not in rules:
        return ""
    hows = {method: " and ".join(found["rate_chosen_by"].unique()) for method, found in runs.items()}
    other = ", but of several searches" if set(hows.values()) == {VALIDATION} else ""
    return ", ".join(f"{method} {how}" for method, how in hows.items()) + other


def rate_table(sweep: Sweep) -> Table | None:
    """Return the rates of every method, with the cells of each if there are several; None if nothing was trained."""
    trained = sweep.finished.dropna(subset="rate_chosen_by")
    rows = []
    for model in sweep.plan.models:
        for method in sweep.plan.methods:
            runs = trained[(trained["model"] == model) & (trained["method"] == method)]
            rates = runs.groupby(["learning_rate", "rate_chosen_by", "rate_rule"], dropna=False, sort=False)
            for (rate, how, _), some in rates:
                places = (some["dataset"] + " " + some["budget"]).unique()
                where = "everywhere" if len(rates) == 1 else ", ".join(places)
                rows.append(
                    row(method, model, how, where, TableCell(shown_rate(rate), sort=None if isna(rate) else rate))
                )
    if not rows:
        return None
    below = [meaning for how, meaning in _MEANINGS.items() if (trained["rate_chosen_by"] == how).any()]
    if (trained["rate_chosen_by"] == VALIDATION).any():
        below.append(_searched(sweep))
    header = row("Method", "Model", "Chosen by", "Where", "Learning rate")
    return Table("rates-methods", "Learning rates and how they were chosen", header, rows, below, left=4)


def shown_rate(rate: float) -> str:
    """Return a rate as text of a table."""
    return "unknown" if isna(rate) else f"{rate:g}"


def _searched(sweep: Sweep) -> str:
    """Return the grid and the rule of the search."""
    found = sweep.plan.tuned
    names = {name: ", ".join(map(str, found.get(name) or ["?"])) for name in ("datasets", "budgets", "seeds")}
    made = " ".join(str(found[name])[:12] for name in ("version", "git_commit") if found.get(name))
    by = f", by randlora-pl {made}" if made else ""
    return (
        f"The search: {found.get('monitor', 'val/acc')} on {names['datasets']} at {names['budgets']}, seeds "
        f"{names['seeds']}{by}. One rate for all datasets and budgets."
    )
