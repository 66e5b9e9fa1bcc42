"""Other datasets: accuracy after the training, and forgetting, its change by the training."""

from collections.abc import Sequence
from statistics import fmean

from randlora_pl.data.catalog.registry import CATALOG
from randlora_pl.lab.report.document import Table, TableCell, row
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.results import Results
from randlora_pl.lab.report.runs import FinishedRun
from randlora_pl.lab.report.sections.accuracy import estimate_text, identifier
from randlora_pl.lab.report.sections.pairwise_tests import shown_difference
from randlora_pl.lab.report.sections.paper_comparison import Beside, PaperAverage
from randlora_pl.lab.report.statistics import Estimate
from randlora_pl.sweep.description import ZERO_SHOT, is_zero_shot

BEFORE, AFTER = "zeroshot/elsewhere/", "test/elsewhere/"


def elsewhere_table(results: Results, model: str) -> Table | None:
    """Return the change of each method in points, over datasets and seeds; None where no run measured it."""
    runs = [run for run in results.sweep.finished if run.key.model == model]
    names = sorted({name.removeprefix(AFTER) for run in runs for name in run.facts if name.startswith(AFTER)})
    before = {
        name: fmean(found)
        for name in names
        if (found := [value for run in runs if (value := _before(run, name)) is not None])
    }
    if not before:
        return None
    rows = []
    for method in results.plan.methods:
        if is_zero_shot(method):
            continue
        cells = [_change(results, model, method, name, 100 * before[name]) for name in before]
        if any(not cell.missing for cell in cells):
            rows.append(row(method, *cells))
    if not rows:
        return None
    pretrained = ", ".join(f"{name} {100 * value:.1f} %" for name, value in before.items())
    return Table(
        f"elsewhere-{identifier(model)}",
        f"{model}: change of the zero-shot accuracy on other datasets, points",
        row("Method", *before),
        rows,
        [],
        (),
        [
            f"Forgetting is negative. The pretrained model has {pretrained}. Each value is averaged over the datasets "
            "and amounts of data of the training. The interval is over seeds."
        ],
    )


def transfer_table(results: Results, beside: Beside, model: str) -> Table | None:
    """Return the accuracies on other datasets and their means, by training; None where no run measured several."""
    runs = [run for run in results.sweep.finished if run.key.model == model]
    found = [name for run in runs for name in run.facts if name.startswith(AFTER)]
    names = [name.removeprefix(AFTER) for name in dict.fromkeys(found)]
    if len(names) < 2:
        return None
    shifted = [name for name in names if name in CATALOG and CATALOG[name].trains_on]
    others = [name for name in names if name not in shifted]
    means = {"Mean of other datasets": others, "Mean of shifted test sets": shifted}
    means = {title: group for title, group in means.items() if len(group) > 1}
    rows, shown = [], []
    for key in dict.fromkeys(run.key for run in runs):
        groups = [[key.dataset], *([name] for name in names), *means.values()]
        printed = [beside.average(key.model, key.budget, key.method, group) for group in groups]
        cells = [_mean(results.finished(key), *both) for both in zip(groups[1:], printed[1:], strict=True)]
        if own := results.estimate(key) if any(not cell.missing for cell in cells) else None:
            here = [cell for found in printed if found for cell in found.cells]
            shown += here
            name = TableCell(key.method, notes=beside.row_notes(here))
            rows.append(row(name, key.dataset, key.budget, _cell(own, "", printed[0]), *cells))
    return Table(
        f"transfer-{identifier(model)}",
        f"{model}: accuracy in percent on the test images of other datasets",
        row("Method", "Trained on", "Data", "There", *names, *means),
        rows,
        [],
        beside.caption_notes(shown),
        ["Each dataset is classified among its own classes, by their names alone. Intervals are over seeds."],
        left=3,
    )


def _before(run: FinishedRun, name: str) -> float | None:
    """Return the accuracy of the pretrained model on another dataset, which a cell of its own logs as a test."""
    found = run.number(BEFORE + name)
    return run.number(AFTER + name) if found is None and is_zero_shot(run.key.method) else found


def _mean(runs: Sequence[FinishedRun], names: Sequence[str], paper: PaperAverage | None) -> TableCell:
    """Return the mean accuracy on some datasets, of the seeds that have all of them, and the printed one below."""
    keys = [AFTER + name for name in names]
    whole = [run for run in runs if run.facts.keys() >= set(keys)]
    means = {run.seed: 100 * fmean(run.facts[key] for key in keys) for run in whole}
    if not means:
        return TableCell("not measured", paper.beside(None) if paper else "", missing=True)
    title = "; ".join(f"seed {seed}: {value:.2f}" for seed, value in means.items())
    return _cell(Estimate(tuple(means.values())), title, paper)


def _cell(estimate: Estimate, title: str, paper: PaperAverage | None) -> TableCell:
    below = paper.beside(estimate.mean) if paper else ""
    return TableCell(estimate_text(estimate), below, title, estimate.mean)


def _change(results: Results, model: str, method: str, name: str, before: float) -> TableCell:
    """Return the mean change, of which each seed's is averaged over the cells that all seeds have."""
    of_cells = [
        {run.seed: 100 * value - before for run in results.finished(key) if (value := run.number(AFTER + name))}
        for dataset in results.plan.datasets
        for budget in results.budgets(model)
        if budget != ZERO_SHOT and results.finished(key := Key(model, dataset, budget, method))
    ]
    of_cells = [cell for cell in of_cells if cell]
    if not of_cells:
        return TableCell("not measured", missing=True)
    seeds = sorted(set.intersection(*(set(cell) for cell in of_cells)), key=str)
    values = [fmean(cell[seed] for cell in of_cells) for seed in seeds]
    estimate = Estimate(tuple(values or [fmean(fmean(cell.values()) for cell in of_cells)]))
    title = "; ".join(f"seed {seed}: {value:+.2f}" for seed, value in zip(seeds, values, strict=True))
    return TableCell(shown_difference(estimate), "", title, estimate.mean)
