"""Tables of accuracies: every cell with the paper's value, averages of each budget, new classes, other datasets.

Forgetting is the change on other datasets by the training.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from pandas import DataFrame, isna

from randlora_pl.data.catalog.registry import CATALOG
from randlora_pl.lab.report.cells import FINISHED, LABELS, MOST, SIDE, Average, Key, Sweep, of_rows
from randlora_pl.lab.report.document import Printed, Table, TableCell, many, mean_cell, percent, row
from randlora_pl.lab.report.paper_comparison import Beside
from randlora_pl.lab.report.statistics import Estimate, formatted
from randlora_pl.sweep.description import ZERO_SHOT, is_zero_shot

IDLE = "no change shown"
"""Mark of a cell whose interval contains the accuracy of the pretrained model."""
PLAIN = (
    "Classifiers of raw pixels or words see the training samples of the methods, but no pretrained model. Images of "
    f"several sizes, or of more than {SIDE} × {SIDE} pixels, are resized to that. If all training images have more "
    f"than {MOST:,} values, as many as fit are drawn. Options are the defaults of scikit-learn, and nothing is tuned. "
    "No test of pairs has them."
)
_LONGEST = 60
"""Letters of an identifier: names of files must end somewhere."""
_SHORT = 24
"""Letters of a reason that fit into a cell; the tooltip and the list of missing runs have all of it."""


def accuracy_table(sweep: Sweep, beside: Beside, model: str) -> Table:
    """Return the layout of Tables 11 to 14: budgets and methods down, datasets across."""
    plan = sweep.plan
    there = {key for key in sweep.runs if key.model == model}
    datasets = [dataset for dataset in plan.datasets if any(key.dataset == dataset for key in there)]
    rows: list[list[TableCell]] = []
    groups, below = [], []
    for budget in sweep.budgets(model):
        shared, left_out = sweep.common(model, budget)
        groups.append(len(rows))
        for method in plan.methods:
            keys = [Key(model, dataset, budget, method) for dataset in datasets]
            if any(key in there for key in keys):
                cells = [accuracy_cell(sweep, beside, key) for key in keys]
                average = average_cell(sweep, beside, model, budget, method, shared)
                rows.append(row(method, _data(sweep, budget), sweep.parameters(model, method), *cells, average))
        rows += _plain(sweep, budget, datasets, shared)
        below += left_out_line(budget, left_out)
    return Table(
        f"accuracy-{identifier(model)}",
        f"{model}: test {sweep.measured} in percent, mean ± half the 95 % confidence interval over seeds",
        row(
            "Method",
            "Data",
            "Trained parameters",
            *(TableCell(d, sweep.metrics.get(d, "")) for d in datasets),
            "Average",
        ),
        rows,
        [*below, *[PLAIN] * bool(sweep.baselines)],
        groups,
        left=2,
    )


def average_table(sweep: Sweep, beside: Beside, model: str) -> Table:
    """Return a table of methods by budgets: the averages over the datasets that every compared method has."""
    common = {budget: sweep.common(model, budget) for budget in sweep.budgets(model)}
    rows = []
    for method in sweep.plan.methods:
        if any(key.model == model and key.method == method for key in sweep.runs):
            cells = [
                average_cell(sweep, beside, model, budget, method, shared)
                if (budget == ZERO_SHOT) == is_zero_shot(method)
                else TableCell("")
                for budget, (shared, _) in common.items()
            ]
            rows.append(row(method, sweep.parameters(model, method), *cells))
    titles = [TableCell(budget, many(len(shared), "dataset")) for budget, (shared, _) in common.items()]
    return Table(
        f"averages-{identifier(model)}",
        f"{model}: {sweep.measured} averaged over the datasets that every compared method has",
        row("Method", "Trained parameters", *titles),
        rows,
        [line for budget, (_, left_out) in common.items() for line in left_out_line(budget, left_out)],
    )


def accuracy_cell(sweep: Sweep, beside: Beside, key: Key) -> TableCell:
    """Return a cell with its interval, each seed's value in its tooltip, and the paper's value below."""
    paper, runs = beside.cell(key), sweep.runs.get(key)
    if runs is None:
        return TableCell("", paper.beside(None) if paper else "", missing=True, paper=paper)
    states = zip(runs["seed"], runs["accuracy"], runs["status"], strict=True)
    values = [f"seed {'?' if isna(seed) else seed}: {_value(value) or status}" for seed, value, status in states]
    estimate, title = sweep.estimate(key), "; ".join([" ".join(key), *values])
    if estimate is None:
        below = paper.beside(None) if paper else ""
        return TableCell(_cut(sweep.why_missing(key)), below, title, missing=True, paper=paper)
    cell = mean_cell(estimate, title + "; one seed: no interval" * (estimate.half is None), paper=paper)
    partly = f"{len(estimate.values)} of {len(runs)} seeds" if (runs["state"] != FINISHED).any() else ""
    cell.below = joined(IDLE if sweep.idle(key) else "", partly, cell.below)
    return cell


def average_cell(
    sweep: Sweep, beside: Beside, model: str, budget: str, method: str, datasets: Sequence[str]
) -> TableCell:
    """Return an average, the paper's below it, in its tooltip what was averaged; or why there is none."""
    paper = beside.average(model, budget, method, datasets)
    average = sweep.average(model, budget, method, datasets)
    if average is None:
        keys = [key for name in sweep.plan.datasets if (key := Key(model, name, budget, method)) in sweep.runs]
        why = " / ".join(dict.fromkeys(map(sweep.why_missing, keys))) or "not run"
        why = "no dataset in common" if any(key in sweep.accuracies for key in keys) else why
        return TableCell(_cut(why), paper.beside(None) if paper else "", why, missing=True, paper=paper)
    text = [f"over {', '.join(average.datasets)}"]
    unused = sorted({*average.all_seeds} - {*average.seeds})
    partly = ""
    if average.estimate.half is None:
        text.append("fewer than two seeds on all of them, so no interval")
    else:
        seeds = zip(average.seeds, average.estimate.values, strict=True)
        text += [f"seed {seed}: {_value(value)}" for seed, value in seeds]
        if unused:
            text.append(f"seeds that not every dataset has are left out: {', '.join(map(str, unused))}")
            partly = f"{len(average.seeds)} of {len(average.all_seeds)} seeds"
    cell = mean_cell(average.estimate, "; ".join(text), paper=paper)
    cell.below = joined(partly, cell.below)
    return cell


def _plain(sweep: Sweep, budget: str, datasets: Sequence[str], shared: Sequence[str]) -> list[list[TableCell]]:
    """Return a row for each plain classifier of a budget; its average is over the datasets of the others."""
    rows = []
    here = [one for one in sweep.baselines if one.budget == budget and one.dataset in datasets]
    for name in dict.fromkeys(one.name for one in here):
        cells, means = [], {}
        for dataset in datasets:
            some = [one for one in here if (one.name, one.dataset) == (name, dataset)]
            cells.append(TableCell(""))
            if some:
                cells[-1] = mean_cell(estimate := Estimate(tuple(100 * one.score for one in some)))
                means[dataset] = estimate.mean
                if some[0].train < some[0].of:
                    cells[-1].below = f"{some[0].train:,} of {some[0].of:,} samples"
        whole = bool(shared) and means.keys() >= {*shared}
        average = mean_cell(Estimate((fmean(means[d] for d in shared),))) if whole else TableCell("")
        rows.append(row(name, _data(sweep, budget), None, *cells, average))
    return rows


def joined(*marks: str) -> str:
    """Return the second line of a cell: what it has of marks, such as how many seeds, and a printed value."""
    return " · ".join(filter(None, marks))


def left_out_line(budget: str, left_out: dict[str, list[str]]) -> list[str]:
    """Return lines that name the datasets left out of a budget's averages, and the methods without a run there."""
    if not left_out:
        return []
    text = "; ".join(f"{dataset} (no finished run of {', '.join(methods)})" for dataset, methods in left_out.items())
    return [f"{budget}: the averages leave out {text}."]


def identifier(label: str) -> str:
    """Return a label as part of a name of files and anchors; `build` appends numbers to equal ones."""
    return re.sub(r"[\W_]+", "-", label.lower()).strip("-")[:_LONGEST] or "unnamed"


def _data(sweep: Sweep, budget: str) -> TableCell:
    return TableCell(budget, sort=sweep.plan.budgets.index(budget))


def _value(value: float) -> str:
    return "" if isna(value) else f"{value:.2f}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHORT + 8 else text[: _SHORT + 7].rstrip() + "…"


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


NEW = "test/new/acc"
"""Accuracy on the new classes, as the callback `NewClasses` logs it."""


def harmonic_mean(base: float, new: float) -> float:
    """Return 2bn / (b + n), or 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def new_classes_table(base: Sweep, beside: Beside, model: str) -> Table | None:
    """Return base, new and harmonic mean by dataset and on average; None if no run was tested on new classes."""
    if NEW not in base.cells or base.of(model=model)[NEW].isna().all():
        return None
    measured = (100 * base.cells[NEW]).round(4).where(base.cells["accuracy"].notna())  # as cells.csv has it
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
