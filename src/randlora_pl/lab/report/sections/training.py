"""Speed of training: steps and time to the final loss of a reference, and the loss on the way."""

from collections.abc import Sequence
from fractions import Fraction
from math import log
from statistics import fmean

from pandas import DataFrame, Series

from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.curves import TRAINED, at, losses, reached
from randlora_pl.lab.report.document import Table, TableCell, mean_cell, row
from randlora_pl.lab.report.sections.accuracy import identifier
from randlora_pl.lab.report.statistics import Estimate, formatted

_SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))
_REFERENCES = ("LoRA", "FullFineTuning")


def training_table(sweep: Sweep, model: str) -> Table | None:
    """Return the steps and time to the final loss of a reference; None where no two methods logged such a loss."""
    found = {method: reference for reference, group in by_reference(sweep, model).items() for method in group}
    runs, rows = logged_runs(sweep, model), []
    for method in filter(found.__contains__, sweep.plan.methods):
        if len(pairs := _pairs(runs, method, found[method])):
            rows.append(_row(method, found[method], pairs))
    if len(rows) < 2:
        return None
    header = row(
        *("Method", "Reference", "Steps to its loss, %", "Not reached", "Time to its loss, %", "Time of a run, %"),
        *(f"Loss at {share}" if share < 1 else "Loss at the end" for share in _SHARES),
    )
    below = [
        "The reference of a method is the LoRA with the nearest number of parameters and the same kind of loss, or "
        "full fine-tuning if no LoRA was run. A run is cut into 16 equal parts, or fewer with at least 5 steps, and "
        "its loss in a part is the mean of those that it logged. It reaches the loss of the reference after the first "
        "part that is not above the last part of the reference. A run that never does counts as 100 %. The row of a "
        "reference itself shows what noise does.",
        "Losses are differences to the reference after an eighth, a quarter and a half of the steps and at the end, "
        "paired by dataset, budget and seed. Times are percents of the whole run of the reference. All are means over "
        "datasets with 95 % confidence intervals.",
    ]
    caption = f"{model}: training loss beside a reference"
    return Table(f"training-{identifier(model)}", caption, header, rows, below, left=2)


def by_reference(sweep: Sweep, model: str) -> dict[str, list[str]]:
    """Return the references of a model, each with the methods whose mark is its loss, itself among them."""
    logged = logged_runs(sweep, model)["method"].unique()
    kinds = {method: kind_of_loss(sweep, method) for method in sweep.plan.methods if method in logged}
    found: dict[str, list[str]] = {}
    for method, kind in kinds.items():
        if reference := _reference(sweep, model, method, [one for one in kinds if kinds[one] == kind]):
            found.setdefault(reference, []).append(method)
    return found


def logged_runs(sweep: Sweep, model: str) -> DataFrame:
    """Return the finished runs of a model that logged their loss, with its means in the column ``losses``."""
    runs = sweep.of(model=model).dropna(subset=TRAINED)
    runs = runs.assign(losses=runs[TRAINED].map(losses).astype(object))
    return runs[runs["losses"].map(bool).astype(bool)]


def _pairs(runs: DataFrame, method: str, reference: str) -> DataFrame:
    """Compare the runs of a method with the runs of its reference on the same dataset, budget and seed."""
    ours, theirs = (runs[runs["method"] == name] for name in (method, reference))
    pairs = ours.merge(theirs, on=["dataset", "budget", "seed"], suffixes=("", " of reference"))
    curves = list(zip(pairs["losses"], pairs["losses of reference"], strict=True))
    shares = [reached(curve, other[-1]) for curve, other in curves]
    steps = DataFrame({"steps": [100 * float(share or 1) for share in shares]})
    seconds, base = (pairs[name].where(pairs[name] > 0) for name in ("fit_seconds", "fit_seconds of reference"))
    whole = (100 * seconds / base).where(pairs["device"] == pairs["device of reference"])
    found = steps.assign(
        dataset=pairs["dataset"],
        never=[share is None for share in shares],
        whole=whole,
        time=steps["steps"] * whole / 100,
    )
    for when in _SHARES:
        ours, theirs = (Series([at(both[n], when) for both in curves], dtype=float) for n in (0, 1))
        found[when] = ours - theirs
    return found


def _row(method: str, reference: str, pairs: DataFrame) -> list[TableCell]:
    itself, never = method == reference, int(pairs["never"].sum())
    return row(
        method,
        "itself" if itself else reference,
        over_datasets(pairs, "steps", ".0f"),
        TableCell(f"{never} of {len(pairs)}", sort=never / len(pairs)),
        over_datasets(pairs, "time", ".0f"),
        over_datasets(pairs, "whole", ".0f"),
        *(TableCell("") if itself else over_datasets(pairs, when, "+.3f") for when in _SHARES),
    )


def over_datasets(table: DataFrame, column: object, form: str, nothing: str = "not measured") -> TableCell:
    """Return the mean over datasets of the means of a column, with its interval, and each dataset in the tooltip."""
    known = table[["dataset", column]].dropna()
    means = known.groupby("dataset", sort=False)[column].agg(fmean)
    if means.empty:
        return TableCell(nothing, missing=True)
    return mean_cell(
        Estimate(tuple(means)), "; ".join(f"{dataset} {formatted(mean, form)}" for dataset, mean in means.items()), form
    )


def _reference(sweep: Sweep, model: str, method: str, alike: Sequence[str]) -> str | None:
    """Return which of the methods with the same kind of loss is the mark of one, itself if it is such a mark."""
    size = sweep.parameters(model, method)
    for kind in _REFERENCES:
        sizes = {one: n for one in alike if sweep.kind(one) == kind and (n := sweep.parameters(model, one))}
        if sizes and size:
            return min(sizes, key=lambda one: (abs(log(sizes[one] / size)), one != method))
    return None


def kind_of_loss(sweep: Sweep, method: str) -> tuple[object, ...]:
    """Return what must be equal for two training losses to be comparable: the task and its options of the loss."""
    tasks = sorted(sweep.of(method=method)["task"].astype(str).unique())
    options = sweep.plan.methods[method].get("set") or {}
    return tasks, sorted((name, str(value)) for name, value in options.items() if name.startswith("model.loss"))
