"""Rank of the update against accuracy, as Table 2 of the paper claims a relation."""

from collections.abc import Callable
from math import log
from statistics import fmean

from randlora_pl.lab.report.document import Table, TableCell, many, row
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.results import Results
from randlora_pl.lab.report.sections.training import mean_cell
from randlora_pl.lab.report.statistics import partial_rank_correlation, rank_correlation

_RANKS = ("spectrum/rank", "spectrum/effective_rank", "spectrum/stable_rank")
_NEAR = 0.05
"""Ranks that are lower than the largest by at most this share count as equal to it: which is higher is rounding."""
_CONTROLS = {
    "a": "its sums come first, so that its rank is lower, and so is the count of its free parameters",
    "b": "it has half of the terms",
}
"""Variants of RandLoRA that train as many numbers and have a lower rank."""


def rank_table(results: Results) -> Table | None:
    """Return a table of correlations; None where no run has metrics of the update.

    It has Spearman's correlation over methods, in each model and budget, of the mean of a ``spectrum/...`` metric with
    the mean accuracy over the datasets that all of these methods have.
    """
    every = {n for run in results.sweep.finished for n in run.facts if n.startswith("spectrum/") and run.number(n)}
    names = sorted(every - {"spectrum/steps"})
    rows = []
    for name in names:
        for model in results.plan.models:
            for budget in results.trained_budgets(model):
                ranks, accuracies = _ranks(results, name, model, budget)
                value = rank_correlation(_leveled(name, list(ranks.values())), list(accuracies.values()))
                if value is not None:
                    each = "; ".join(f"{method}: {ranks[method]:.4g}, {accuracies[method]:.1f} %" for method in ranks)
                    shown = TableCell(f"{value:+.2f}", "", each, value)
                    rows.append(row(name.removeprefix("spectrum/").replace("_", " "), model, budget, shown, len(ranks)))
    if not rows:
        return None
    header = row("Metric of the update", "Model", "Data", "Spearman's correlation", "Methods")
    below = [
        "Over the methods of each model and budget, for any number of parameters. Ranks within 5 % of the highest "
        "count as equal. It does not show a cause."
    ]
    return Table(
        "versus-rank", "Rank of the update against accuracy (the claim of Table 2)", header, rows, below=below, left=3
    )


def _ranks(results: Results, name: str, model: str, budget: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return mean rank and mean accuracy of each method that has both."""
    shared = tuple(results.common(model, [budget])[0])
    ranks, accuracies = {}, {}
    for method in results.methods(model, budget):
        runs = [run for dataset in shared for run in results.finished(Key(model, dataset, budget, method))]
        values = [value for run in runs if (value := run.number(name)) is not None]
        average = results.average(model, budget, method, shared)
        if average and len(values) == len(runs):
            ranks[method], accuracies[method] = fmean(values), average.estimate.mean
    return ranks, accuracies


def _leveled(name: str, ranks: list[float]) -> list[float]:
    """Return ranks of which nearly full ones are equal; other metrics as they are."""
    highest = (1 - _NEAR) * max(ranks, default=0)
    return [min(rank, highest) for rank in ranks] if name == _RANKS[0] else ranks


def partial_table(results: Results) -> Table | None:
    """Return the correlations of ranks with accuracy at equal parameters; None where too few runs have a rank.

    Spearman's correlation is over the methods of each dataset and budget, of means over seeds. Its mean and interval
    are over datasets.
    """
    rows = []
    for name in _RANKS:
        for model in results.plan.models:
            cells = {
                (dataset, budget): found
                for dataset in results.plan.datasets
                for budget in results.trained_budgets(model)
                if len(found := _points(results, name, model, dataset, budget)) > 3
            }
            partial = _over_datasets(cells, lambda points: partial_rank_correlation(*zip(*points, strict=True)))
            plain = _over_datasets(cells, lambda points: rank_correlation(*list(zip(*points, strict=True))[:2]))
            if partial.sort is not None:
                counts = sorted({len(found) for found in cells.values()})
                methods = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
                shown = name.removeprefix("spectrum/").replace("_", " ")
                rows.append(row(shown, model, partial, plain, methods, len({dataset for dataset, _ in cells})))
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
        *_controls(results),
    ]
    title = "Rank of the update against accuracy, at equal parameters"
    return Table("versus-rank-partial", title, header, rows, below=below, left=2)


def _points(results: Results, name: str, model: str, dataset: str, budget: str) -> list[tuple[float, float, float]]:
    """Return mean metric, mean accuracy and logarithm of the parameters of each method that has them."""
    points = []
    for method in results.methods(model, budget):
        key = Key(model, dataset, budget, method)
        values = [value for run in results.finished(key) if (value := run.number(name)) is not None]
        estimate, size = results.estimate(key), results.parameters(model, method)
        if values and estimate and size:
            points.append((fmean(values), estimate.mean, log(size)))
    ranks = _leveled(name, [rank for rank, _, _ in points])
    return [(rank, accuracy, size) for rank, (_, accuracy, size) in zip(ranks, points, strict=True)]


def _over_datasets(
    cells: dict[tuple[str, str], list[tuple[float, float, float]]],
    of: Callable[[list[tuple[float, float, float]]], float | None],
) -> TableCell:
    """Return the mean of a correlation over datasets, of their means over budgets, with its interval."""
    found: dict[str, list[float]] = {}
    for (dataset, _), points in cells.items():
        if (value := of(points)) is not None:
            found.setdefault(dataset, []).append(value)
    means = {dataset: fmean(values) for dataset, values in found.items()}
    return mean_cell(means, "{:+.2f}", "{:.2f}", "not defined")


def _controls(results: Results) -> list[str]:
    """Return a sentence that names the variants of RandLoRA with a lower rank at equally many trained numbers."""
    variants = {m: str(results.plan.fact("methods", m).get("variant")) for m in results.plan.methods}
    named = []
    for method, variant in variants.items():
        runs = [run for run in results.sweep.finished if run.key.method == method]
        ranks = [value for run in runs if (value := run.number(_RANKS[0])) is not None]
        if variant in _CONTROLS and ranks:
            named.append(f"{method} ({_CONTROLS[variant]}; rank {fmean(ranks):.0f})")
    if not named:
        return []
    return [f"{many(len(named), 'control')} with as many trained numbers as RandLoRA: {', '.join(named)}."]
