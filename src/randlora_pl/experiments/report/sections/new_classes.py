"""Base classes and new classes: accuracy on the classes of the training, on the others, and their harmonic mean."""

import math
from dataclasses import replace

from randlora_pl.experiments.report.collect import Sweep
from randlora_pl.experiments.report.document import Table, TableCell, row
from randlora_pl.experiments.report.plan import Key
from randlora_pl.experiments.report.results import Average, Results
from randlora_pl.experiments.report.runs import FinishedRun
from randlora_pl.experiments.report.sections.accuracy import estimate_text, identifier, left_out_line
from randlora_pl.experiments.report.statistics import Estimate

NEW = "new/acc"
AFTER = f"test/{NEW}"
"""Accuracy on the new classes, as the callback `NewClasses` logs it."""


def harmonic_mean(base: float, new: float) -> float:
    """Return 2bn / (b + n), or 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def with_metric(sweep: Sweep, metric: str) -> Sweep:
    """Return a sweep with another metric in place of the accuracy; runs without it have no result."""

    def measured(run: FinishedRun) -> float | None:
        value = run.facts.get(metric)
        known = run.accuracy is not None and isinstance(value, int | float) and math.isfinite(value)
        return 100 * float(value or 0) if known else None

    runs = [replace(run, accuracy=measured(run)) for run in sweep.runs]
    return Sweep(sweep.folder, sweep.plan, runs, sweep.warnings)


def new_classes_table(sweep: Sweep, model: str) -> Table | None:
    """Return base, new and harmonic mean by dataset and on average; None if no run was tested on new classes."""
    base, new = Results(sweep), Results(with_metric(sweep, AFTER))
    if not any(run.key.model == model for run in new.sweep.finished):
        return None
    rows: list[list[TableCell]] = []
    groups, below = [], []
    datasets = [d for d in sweep.plan.datasets if any(run.key[:2] == (model, d) for run in new.sweep.finished)]
    for budget in new.budgets(model):
        methods = new.methods(model, budget)
        shared, left_out = new.common(model, [budget])
        if methods:
            groups.append(len(rows))
        for method in methods:
            cells = [_cell(base, new, Key(model, dataset, budget, method)) for dataset in datasets]
            averages = [results.average(model, budget, method, tuple(shared)) for results in (base, new)]
            rows.append(row(method, budget, *cells, *_averages(*averages)))
        below += left_out_line(budget, left_out)
    return Table(
        f"new-classes-{identifier(model)}",
        f"{model}: test accuracy in percent on base classes / new classes, and their harmonic mean H",
        row("Method", "Data", *datasets, "Base", "New", "H"),
        rows,
        groups,
        (),
        [
            "The model trains on the base classes, the first half. The images of each half are classified among the "
            "classes of this half. Base and New are averages over datasets, and H = 2bn / (b + n) is computed from "
            "these averages. Intervals are over seeds.",
            *below,
        ],
        left=2,
    )


def _cell(base: Results, new: Results, key: Key) -> TableCell:
    """Return base / new of a dataset, with the harmonic mean below."""
    first, second = base.estimate(key), new.estimate(key)
    if first is None or second is None:
        return TableCell("not measured", missing=True)
    mean = harmonic_mean(first.mean, second.mean)
    values = new.by_seed(key)
    title = "; ".join(f"seed {n}: {b:.2f} / {values[n]:.2f}" for n, b in base.by_seed(key).items() if n in values)
    return TableCell(f"{first.mean:.1f} / {second.mean:.1f}", f"H {mean:.1f}", title, mean)


def _averages(base: Average | None, new: Average | None) -> list[TableCell]:
    """Return the averages of base and new classes, and the harmonic mean of both."""
    if base is None or new is None:
        return [TableCell("no dataset in common", missing=True)] * 3
    cells = [TableCell(estimate_text(one.estimate), sort=one.estimate.mean) for one in (base, new)]
    mean = harmonic_mean(base.estimate.mean, new.estimate.mean)
    pairs = zip(base.estimate.values, new.estimate.values, strict=False) if base.seeds == new.seeds else ()
    spread = Estimate(tuple(harmonic_mean(b, n) for b, n in pairs) or (mean,)).half
    return [*cells, TableCell(f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}"), sort=mean)]
