"""Tables of accuracies: every cell, with its interval and the paper's value, and the averages of each budget."""

import re
from collections.abc import Sequence
from statistics import fmean

from pandas import isna

from randlora_pl.lab.report.baselines import MOST, SIDE
from randlora_pl.lab.report.cells import FINISHED, Sweep
from randlora_pl.lab.report.document import Table, TableCell, many, mean_cell, row
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.sections.paper_comparison import Beside
from randlora_pl.lab.report.statistics import Estimate
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
        why = _why(sweep, model, budget, method)
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


def _why(sweep: Sweep, model: str, budget: str, method: str) -> str:
    """Why a method has no average, if it has none."""
    cells = [key for dataset in sweep.plan.datasets if (key := Key(model, dataset, budget, method)) in sweep.runs]
    if any(key in sweep.accuracies for key in cells):
        return "no dataset in common"
    return " / ".join(dict.fromkeys(map(sweep.why_missing, cells))) or "not run"


def _value(value: float) -> str:
    return "" if isna(value) else f"{value:.2f}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHORT + 8 else text[: _SHORT + 7].rstrip() + "…"
