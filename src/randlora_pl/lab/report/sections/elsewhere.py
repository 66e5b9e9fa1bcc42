"""Other datasets: accuracy after the training, and forgetting, its change by the training."""

from collections.abc import Sequence
from statistics import fmean

from pandas import DataFrame

from randlora_pl.data.catalog.registry import CATALOG
from randlora_pl.lab.report.cells import LABELS, Sweep, of_rows
from randlora_pl.lab.report.document import Printed, Table, TableCell, mean_cell, row
from randlora_pl.lab.report.sections.accuracy import identifier
from randlora_pl.lab.report.sections.paper_comparison import Beside
from randlora_pl.lab.report.statistics import Estimate, formatted
from randlora_pl.sweep.description import ZERO_SHOT, is_zero_shot

BEFORE, AFTER = "zeroshot/elsewhere/", "test/elsewhere/"


def elsewhere_table(sweep: Sweep, model: str) -> Table | None:
    """Return the change of each method in points, over datasets and seeds; None where no run measured it."""
    runs = _percent(sweep, model)
    before = {name: fmean(known) for name in sorted(_measured(runs)) if len(known := _before(runs, name))}
    rows = []
    for method in (method for method in sweep.plan.methods if not is_zero_shot(method)):
        trained = runs[(runs["method"] == method) & (runs["budget"] != ZERO_SHOT)]
        cells = [_change(trained, AFTER + name, value) for name, value in before.items()]
        if any(not cell.missing for cell in cells):
            rows.append(row(method, *cells))
    if not rows:
        return None
    pretrained = ", ".join(f"{name} {value:.1f} %" for name, value in before.items())
    return Table(
        f"elsewhere-{identifier(model)}",
        f"{model}: change of the zero-shot accuracy on other datasets, points",
        row("Method", *before),
        rows,
        [
            f"Forgetting is negative. The pretrained model has {pretrained}. Each value is averaged over the datasets "
            "and amounts of data of the training. The interval is over seeds."
        ],
    )


def transfer_table(sweep: Sweep, beside: Beside, model: str) -> Table | None:
    """Return the accuracies on other datasets and their means, by training; None where no run measured several."""
    runs = _percent(sweep, model)
    names = _measured(runs)
    if len(names) < 2:
        return None
    shifted = [name for name in names if name in CATALOG and CATALOG[name].trains_on]
    means = {"Mean of other datasets": [name for name in names if name not in shifted]}
    means["Mean of shifted test sets"] = shifted
    means = {title: group for title, group in means.items() if len(group) > 1}
    rows = []
    for (_, dataset, budget, method), some in runs.groupby(LABELS, sort=False):
        own, *printed = (
            beside.average(model, budget, method, group)
            for group in [[dataset], *([n] for n in names), *means.values()]
        )
        groups = [*([name] for name in names), *means.values()]
        cells = [_mean(some, group, paper) for group, paper in zip(groups, printed, strict=True)]
        if any(not cell.missing for cell in cells):
            there = mean_cell(Estimate(tuple(some["accuracy"])), paper=own)
            rows.append(row(method, dataset, budget, there, *cells))
    return Table(
        f"transfer-{identifier(model)}",
        f"{model}: accuracy in percent on the test images of other datasets",
        row("Method", "Trained on", "Data", "There", *names, *means),
        rows,
        ["Each dataset is classified among its own classes, by their names alone. Intervals are over seeds."],
        left=3,
    )


def _percent(sweep: Sweep, model: str) -> DataFrame:
    """Return the finished runs of a model with their accuracies on other datasets in percent."""
    runs = sweep.of(model=model)
    return runs.assign(**{name: 100 * runs[name] for name in runs if name.startswith((BEFORE, AFTER))})


def _measured(runs: DataFrame) -> list[str]:
    """Return the names of the other datasets that any run was tested on."""
    return [name.removeprefix(AFTER) for name in runs if name.startswith(AFTER) and runs[name].notna().any()]


def _before(runs: DataFrame, name: str) -> list[float]:
    """Return the accuracies of the pretrained model on another dataset, which a cell of its own logs as a test."""
    tested = runs[AFTER + name].where(runs["method"].map(is_zero_shot).astype(bool))
    return list(runs.get(BEFORE + name, tested).fillna(tested).dropna())


def _mean(runs: DataFrame, names: Sequence[str], paper: Printed | None) -> TableCell:
    """Return the mean accuracy on some datasets, of the seeds that have all of them, and the printed one below."""
    means = of_rows(runs.set_index("seed")[[AFTER + name for name in names]])
    title = "; ".join(f"seed {seed}: {value:.2f}" for seed, value in means.items())
    return mean_cell(Estimate(tuple(means.values())) if means else None, title, paper=paper)


def _change(runs: DataFrame, name: str, before: float) -> TableCell:
    """Return the mean change, of which each seed's is averaged over the cells that all seeds have."""
    known = runs.dropna(subset=name)
    if known.empty:
        return TableCell("not measured", missing=True)
    cells = known.pivot(index="seed", columns=["dataset", "budget"], values=name).sort_index() - before
    means = of_rows(cells)
    title = "; ".join(f"seed {seed}: {formatted(value, '+.2f')}" for seed, value in means.items())
    values = tuple(means.values()) or (fmean(of_rows(cells.T, partly=True).values()),)
    return mean_cell(Estimate(values), title, "+.2f")
