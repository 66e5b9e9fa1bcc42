"""Base classes and new classes: accuracy on the classes of the training, on the others, and their harmonic mean."""

from collections.abc import Sequence
from dataclasses import replace

from randlora_pl.lab.report.cells import Average, Sweep
from randlora_pl.lab.report.document import Printed, Table, TableCell, mean_cell, percent, row
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.sections.accuracy import identifier, joined, left_out_line
from randlora_pl.lab.report.sections.paper_comparison import Beside
from randlora_pl.lab.report.statistics import Estimate

NEW = "new/acc"
AFTER = f"test/{NEW}"
"""Accuracy on the new classes, as the callback `NewClasses` logs it."""


def harmonic_mean(base: float, new: float) -> float:
    """Return 2bn / (b + n), or 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def new_classes_table(base: Sweep, beside: Beside, model: str) -> Table | None:
    """Return base, new and harmonic mean by dataset and on average; None if no run was tested on new classes."""
    if AFTER not in base.cells or base.of(model=model)[AFTER].isna().all():
        return None
    measured = (100 * base.cells[AFTER]).round(4).where(base.cells["accuracy"].notna())  # as cells.csv has it
    new = replace(base, cells=base.cells.assign(accuracy=measured))
    rows: list[list[TableCell]] = []
    starts, below = [], []
    datasets = [name for name in base.plan.datasets if len(new.of(model=model, dataset=name))]
    for budget in new.budgets(model):
        methods = new.methods(model, budget)
        shared, left_out = new.common(model, budget)
        if methods:
            starts.append(len(rows))
        for method in methods:
            halves = (budget, f"{budget} new")
            groups = [*([dataset] for dataset in datasets), shared]
            *printed, overall = ([beside.average(model, half, method, group) for half in halves] for group in groups)
            keys = [Key(model, dataset, budget, method) for dataset in datasets]
            cells = [_cell(base, new, key, both) for key, both in zip(keys, printed, strict=True)]
            first, second = (sweep.average(model, budget, method, shared) for sweep in (base, new))
            rows.append(row(method, budget, *cells, *_averages(first, second, overall)))
        below += left_out_line(budget, left_out)
    return Table(
        f"new-classes-{identifier(model)}",
        f"{model}: test accuracy in percent on base classes / new classes, and their harmonic mean H",
        row("Method", "Data", *datasets, "Base", "New", "H"),
        rows,
        [
            "The model trains on the base classes, the first half. The images of each half are classified among the "
            "classes of this half. Base and New are averages over datasets, and H = 2bn / (b + n) is computed from "
            "these averages. Intervals are over seeds.",
            *below,
        ],
        starts,
        left=2,
    )


def _harmonic(printed: Sequence[Printed | None]) -> Printed | None:
    """Return the harmonic mean of two printed numbers, None without both."""
    base, new = printed
    return Printed(harmonic_mean(base.value, new.value), base.cells + new.cells) if base and new else None


def _cell(base: Sweep, new: Sweep, key: Key, printed: Sequence[Printed | None]) -> TableCell:
    """Return base / new of a dataset, with the harmonic mean and the printed numbers below."""
    first, second, whole = base.estimate(key), new.estimate(key), _harmonic(printed)
    mean = harmonic_mean(first.mean, second.mean) if first and second else None
    there = " / ".join(percent(found.value) for found in printed if found)
    below = whole.beside(mean).replace(" ", f" {there}, H ", 1) if whole else ""
    if first is None or second is None or mean is None:
        return TableCell("not measured", below, missing=True, paper=whole)
    values = new.by_seed(key)
    title = "; ".join(f"seed {n}: {b:.2f} / {values[n]:.2f}" for n, b in base.by_seed(key).items() if n in values)
    text, below = f"{first.mean:.1f} / {second.mean:.1f}", joined(f"H {mean:.1f}", below)
    return TableCell(text, below, title, mean, paper=whole)


def _averages(base: Average | None, new: Average | None, printed: Sequence[Printed | None]) -> list[TableCell]:
    """Return the averages of base and new classes and the harmonic mean of both, with the printed ones below."""
    if base is None or new is None:
        return [TableCell("no dataset in common", missing=True) for _ in range(3)]
    pairs = zip(base.estimate.values, new.estimate.values, strict=False) if base.seeds == new.seeds else ()
    spread = Estimate(tuple(harmonic_mean(b, n) for b, n in pairs))
    cells = [
        mean_cell(estimate, paper=paper) for estimate, paper in zip((base.estimate, new.estimate), printed, strict=True)
    ]
    mean, whole = harmonic_mean(base.estimate.mean, new.estimate.mean), _harmonic(printed)
    interval = f" ± {spread.half:.1f}" if spread.values and spread.half is not None else ""
    return [*cells, TableCell(f"{mean:.1f}{interval}", whole.beside(mean) if whole else "", sort=mean, paper=whole)]
