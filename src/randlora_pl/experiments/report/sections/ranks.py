"""Rank of the update against accuracy, as Table 2 of the paper claims a relation."""

from statistics import fmean

from randlora_pl.experiments.report.document import Table, TableCell, row
from randlora_pl.experiments.report.plan import Key
from randlora_pl.experiments.report.results import Results
from randlora_pl.experiments.report.statistics import rank_correlation


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
                value = rank_correlation(list(ranks.values()), list(accuracies.values()))
                if value is not None:
                    each = "; ".join(f"{method}: {ranks[method]:.4g}, {accuracies[method]:.1f} %" for method in ranks)
                    shown = TableCell(f"{value:+.2f}", "", each, value)
                    rows.append(row(name.removeprefix("spectrum/").replace("_", " "), model, budget, shown, len(ranks)))
    if not rows:
        return None
    header = row("Metric of the update", "Model", "Data", "Spearman's correlation", "Methods")
    below = ["Over the methods of each model and budget, for any number of parameters. It does not show a cause."]
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
