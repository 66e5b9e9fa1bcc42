"""Rank of the update against accuracy, as Table 2 of the paper claims a relation."""

from itertools import product
from math import log
from statistics import fmean

from pandas import DataFrame, isna

from randlora_pl.lab.report.cells import Key, Sweep
from randlora_pl.lab.report.document import Table, TableCell, many, row
from randlora_pl.lab.report.statistics import formatted, partial_rank_correlation, rank_correlation
from randlora_pl.lab.report.training import over_datasets

_PREFIX = "spectrum/"
_RANKS = ("spectrum/rank", "spectrum/effective_rank", "spectrum/stable_rank")
_NEAR = 0.05
"""Ranks that are lower than the largest by at most this share count as equal to it: which is higher is rounding."""
_CONTROLS = {
    "a": "its sums come first, so that its rank is lower, and so is the count of its free parameters",
    "b": "it has half of the terms",
}
"""Variants of RandLoRA that train as many numbers and have a lower rank."""


def rank_table(sweep: Sweep) -> Table | None:
    """Return a table of correlations; None where no run has metrics of the update.

    It has Spearman's correlation over methods, in each model and budget, of the mean of a ``spectrum/...`` metric with
    the mean accuracy over the datasets that all of these methods have.
    """
    names = [name for name in sorted(sweep.finished) if name.startswith(_PREFIX) and _known(sweep.finished, name)]
    rows = []
    for name, model in product(names, sweep.plan.models):
        for budget in sweep.trained_budgets(model) if name != f"{_PREFIX}steps" else ():
            ranks, accuracies = _ranks(sweep, name, model, budget)
            value = rank_correlation(_leveled(name, list(ranks.values())), list(accuracies.values()))
            if value is not None:
                each = "; ".join(f"{method}: {ranks[method]:.4g}, {accuracies[method]:.1f} %" for method in ranks)
                shown = TableCell(formatted(value, "+.2f"), "", each, value)
                rows.append(row(_title(name), model, budget, shown, len(ranks)))
    if not rows:
        return None
    header = row("Metric of the update", "Model", "Data", "Spearman's correlation", "Methods")
    below = [
        "Over the methods of each model and budget, for any number of parameters. Ranks within 5 % of the highest "
        "count as equal. It does not show a cause."
    ]
    return Table(
        "versus-rank", "Rank of the update against accuracy (the claim of Table 2)", header, rows, below, left=3
    )


def _title(name: str) -> str:
    return name.removeprefix(_PREFIX).replace("_", " ")


def _ranks(sweep: Sweep, name: str, model: str, budget: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return mean rank and mean accuracy of each method that has both."""
    shared = sweep.common(model, budget)[0]
    ranks, accuracies = {}, {}
    for method in sweep.methods(model, budget):
        runs = sweep.of(model=model, budget=budget, method=method)
        runs = runs[runs["dataset"].isin(shared)]
        values, average = _known(runs, name), sweep.average(model, budget, method, shared)
        if average and len(values) == len(runs):
            ranks[method], accuracies[method] = fmean(values), average.estimate.mean
    return ranks, accuracies


def _leveled(name: str, ranks: list[float]) -> list[float]:
    """Return ranks of which nearly full ones are equal; other metrics as they are."""
    highest = (1 - _NEAR) * max(ranks, default=0)
    return [min(rank, highest) for rank in ranks] if name == _RANKS[0] else ranks


def partial_table(sweep: Sweep) -> Table | None:
    """Return the correlations of ranks with accuracy at equal parameters; None where too few runs have a rank.

    Spearman's correlation is over the methods of each dataset and budget, of means over seeds. Its mean and interval
    are over datasets.
    """
    rows = []
    for name, model in product([name for name in _RANKS if name in sweep.finished], sweep.plan.models):
        found = []
        for dataset, budget in product(sweep.plan.datasets, sweep.trained_budgets(model)):
            ranks, accuracies, sizes = _points(sweep, name, model, dataset, budget)
            if len(ranks) > 3:
                values = partial_rank_correlation(ranks, accuracies, sizes), rank_correlation(ranks, accuracies)
                found.append((dataset, len(ranks), *values))
        cells = DataFrame(found, columns=["dataset", "methods", "partial", "plain"])
        partial, plain = (over_datasets(cells, column, "+.2f", "not defined") for column in ("partial", "plain"))
        if partial.sort is not None:
            fewest, most = cells["methods"].min(), cells["methods"].max()
            methods = f"{fewest} to {most}" if fewest < most else str(most)
            rows.append(row(_title(name), model, partial, plain, methods, cells["dataset"].nunique()))
    if not rows:
        return None
    header = row(
        *("Metric of the update", "Model", "Correlation at equal parameters", "Correlation for any number"),
        *("Methods", "Datasets"),
    )
    below = [
        "Spearman's correlation over the methods that have the metric, within each dataset and budget, of means over "
        "seeds. At equal parameters it is partial: what the logarithm of the trained parameters explains is removed. "
        "Means and 95 % confidence intervals are over datasets, which share their methods. Ranks within 5 % of the "
        "highest count as equal. It does not show a cause.",
        *_controls(sweep),
    ]
    title = "Rank of the update against accuracy, at equal parameters"
    return Table("versus-rank-partial", title, header, rows, below, left=2)


def _points(
    sweep: Sweep, name: str, model: str, dataset: str, budget: str
) -> tuple[list[float], list[float], list[float]]:
    """Return mean metric, mean accuracy and logarithm of the parameters of each method that has them."""
    runs = sweep.of(model=model, dataset=dataset, budget=budget)
    points = []
    for method in sweep.methods(model, budget):
        values = _known(runs[runs["method"] == method], name)
        estimate, size = sweep.estimate(Key(model, dataset, budget, method)), sweep.parameters(model, method)
        if values and estimate and size:
            points.append((fmean(values), estimate.mean, log(size)))
    ranks, accuracies, sizes = (list(column) for column in zip(*points, strict=True)) if points else ([], [], [])
    return _leveled(name, ranks), accuracies, sizes


def _known(runs: DataFrame, name: str) -> list[float]:
    """Return the values of a metric of the update; zero was not measured."""
    return [value for value in runs.get(name, ()) if value and not isna(value)]


def _controls(sweep: Sweep) -> list[str]:
    """Return a sentence that names the variants of RandLoRA with a lower rank at equally many trained numbers."""
    named = []
    for method, facts in sweep.plan.methods.items():
        variant = str(facts.get("variant"))
        if variant in _CONTROLS and len(ranks := _known(sweep.of(method=method), _RANKS[0])):
            named.append(f"{method} ({_CONTROLS[variant]}; rank {fmean(ranks):.0f})")
    if not named:
        return []
    return [f"{many(len(named), 'control')} with as many trained numbers as RandLoRA: {', '.join(named)}."]
