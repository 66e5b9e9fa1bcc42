"""Base classes and new classes: accuracy on the classes of the training, on the others, and their harmonic mean."""

import math
from collections.abc import Sequence
from dataclasses import replace

from randlora_pl.lab.report.collect import Sweep
from randlora_pl.lab.report.document import Table, TableCell, row
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.results import Average, Results
from randlora_pl.lab.report.runs import FinishedRun
from randlora_pl.lab.report.sections.accuracy import estimate_text, identifier, joined, left_out_line
from randlora_pl.lab.report.sections.paper_comparison import Beside, PaperAverage, percent
from randlora_pl.lab.report.statistics import Estimate

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
        return round(100 * float(value or 0), 4) if known else None  # as cells.csv has it

    runs = [replace(run, accuracy=measured(run)) for run in sweep.runs]
    return Sweep(sweep.folder, sweep.plan, runs, sweep.warnings)


def new_classes_table(sweep: Sweep, beside: Beside, model: str) -> Table | None:
    """Return base, new and harmonic mean by dataset and on average; None if no run was tested on new classes."""
    base, new = Results(sweep), Results(with_metric(sweep, AFTER))
    if not any(run.key.model == model for run in new.sweep.finished):
        return None
    rows: list[list[TableCell]] = []
    starts, below, shown = [], [], []
    datasets = [d for d in sweep.plan.datasets if any(run.key[:2] == (model, d) for run in new.sweep.finished)]
    for budget in new.budgets(model):
        methods = new.methods(model, budget)
        shared, left_out = new.common(model, [budget])
        if methods:
            starts.append(len(rows))
        for method in methods:
            halves = (budget, f"{budget} new")
            groups = [*([dataset] for dataset in datasets), shared]
            *printed, overall = ([beside.average(model, half, method, group) for half in halves] for group in groups)
            keys = [Key(model, dataset, budget, method) for dataset in datasets]
            cells = [_cell(base, new, key, both) for key, both in zip(keys, printed, strict=True)]
            first, second = (results.average(model, budget, method, tuple(shared)) for results in (base, new))
            here = [cell for both in [*printed, overall] for found in both if found for cell in found.cells]
            shown += here
            name = TableCell(method, notes=beside.row_notes(here))
            rows.append(row(name, budget, *cells, *_averages(first, second, overall)))
        below += left_out_line(budget, left_out)
    return Table(
        f"new-classes-{identifier(model)}",
        f"{model}: test accuracy in percent on base classes / new classes, and their harmonic mean H",
        row("Method", "Data", *datasets, "Base", "New", "H"),
        rows,
        starts,
        beside.caption_notes(shown),
        [
            "The model trains on the base classes, the first half. The images of each half are classified among the "
            "classes of this half. Base and New are averages over datasets, and H = 2bn / (b + n) is computed from "
            "these averages. Intervals are over seeds.",
            *below,
        ],
        left=2,
    )


def _harmonic(printed: Sequence[PaperAverage | None]) -> PaperAverage | None:
    """Return the harmonic mean of two printed numbers, None without both."""
    base, new = printed
    return PaperAverage(harmonic_mean(base.value, new.value), base.cells + new.cells) if base and new else None


def _cell(base: Results, new: Results, key: Key, printed: Sequence[PaperAverage | None]) -> TableCell:
    """Return base / new of a dataset, with the harmonic mean and the printed numbers below."""
    first, second, whole = base.estimate(key), new.estimate(key), _harmonic(printed)
    mean = harmonic_mean(first.mean, second.mean) if first and second else None
    there = " / ".join(percent(found.value) for found in printed if found)
    below = whole.beside(mean).replace(" ", f" {there}, H ", 1) if whole else ""
    if first is None or second is None or mean is None:
        return TableCell("not measured", below, missing=True)
    values = new.by_seed(key)
    title = "; ".join(f"seed {n}: {b:.2f} / {values[n]:.2f}" for n, b in base.by_seed(key).items() if n in values)
    return TableCell(f"{first.mean:.1f} / {second.mean:.1f}", joined(f"H {mean:.1f}", below), title, mean)


def _averages(base: Average | None, new: Average | None, printed: Sequence[PaperAverage | None]) -> list[TableCell]:
    """Return the averages of base and new classes and the harmonic mean of both, with the printed ones below."""
    if base is None or new is None:
        return [TableCell("no dataset in common", missing=True)] * 3
    mean = harmonic_mean(base.estimate.mean, new.estimate.mean)
    pairs = zip(base.estimate.values, new.estimate.values, strict=False) if base.seeds == new.seeds else ()
    spread = Estimate(tuple(harmonic_mean(b, n) for b, n in pairs) or (mean,)).half
    texts = [estimate_text(base.estimate), estimate_text(new.estimate)]
    texts.append(f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}"))
    ours, theirs = (base.estimate.mean, new.estimate.mean, mean), [*printed, _harmonic(printed)]
    return [
        TableCell(text, paper.beside(value) if paper else "", sort=value)
        for text, value, paper in zip(texts, ours, theirs, strict=True)
    ]
