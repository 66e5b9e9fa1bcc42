"""Tables of accuracies: every cell, with its interval and the paper's value, and the averages of each budget."""

import re
from collections.abc import Sequence
from itertools import chain
from statistics import fmean

from randlora_pl.lab.paper import PaperCell
from randlora_pl.lab.report.baselines import MOST, SIDE, Baseline
from randlora_pl.lab.report.collect import FINISHED
from randlora_pl.lab.report.document import Table, TableCell, many, row
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.results import Average, Results
from randlora_pl.lab.report.sections.paper_comparison import Beside, PaperAverage
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


def accuracy_table(results: Results, beside: Beside, model: str) -> Table:
    """Return the layout of Tables 11 to 14: budgets and methods down, datasets across."""
    plan = results.plan
    budgets = results.budgets(model)
    every = [Key(model, d, b, m) for d in plan.datasets for b in budgets for m in plan.methods]
    datasets = list(dict.fromkeys(key.dataset for key in every if results.runs(key)))
    shown = {dataset: _printed(beside, [key for key in every if key.dataset == dataset]) for dataset in datasets}
    marks = beside.caption_notes(chain(*shown.values()))  # first, so that they are counted first
    rows: list[list[TableCell]] = []
    groups, below = [], []
    for budget in budgets:
        lines = {m: [Key(model, d, budget, m) for d in datasets] for m in plan.methods}
        lines = {m: keys for m, keys in lines.items() if any(map(results.runs, keys))}
        shared, left_out = results.common(model, [budget])
        averages = {m: results.average(model, budget, m, tuple(shared)) for m in lines}
        groups.append(len(rows))
        for method, keys in lines.items():
            overall = beside.average(model, budget, method, shared)
            printed = [*_printed(beside, keys), *(overall.cells if overall else ())]
            name = TableCell(method, notes=beside.row_notes(printed))
            cells = [accuracy_cell(results, beside, key) for key in keys]
            why = _why(results, model, budget, method)
            average = average_cell(averages[method], beside, overall, why)
            data = TableCell(budget, sort=plan.budgets.index(budget))
            rows.append(row(name, data, results.parameters(model, method), *cells, average))
        rows += _plain(results, budget, datasets, shared)
        below += left_out_line(budget, left_out)
    below += [PLAIN] if results.sweep.baselines else []
    titles = [
        TableCell(dataset, results.metrics.get(dataset, ""), notes=beside.column_notes(shown[dataset]))
        for dataset in datasets
    ]
    return Table(
        f"accuracy-{identifier(model)}",
        f"{model}: test {results.measured} in percent, mean ± half the 95 % confidence interval over seeds",
        row("Method", "Data", "Trained parameters", *titles, "Average"),
        rows,
        groups,
        marks,
        below,
        left=2,
    )


def average_table(results: Results, beside: Beside, model: str) -> Table:
    """Return a table of methods by budgets: the averages over the datasets that every compared method has."""
    budgets = results.budgets(model)
    common = {budget: results.common(model, [budget]) for budget in budgets}
    shared = {budget: tuple(datasets) for budget, (datasets, _) in common.items()}
    methods = [m for m in results.plan.methods if any(_cells(results, model, b, m) for b in budgets)]
    printed = {(m, b): beside.average(model, b, m, shared[b]) for m in methods for b in budgets}
    marks = beside.caption_notes(cell for paper in printed.values() if paper for cell in paper.cells)
    of_method = {m: [cell for b in budgets if (paper := printed[m, b]) for cell in paper.cells] for m in methods}
    rows = [
        row(TableCell(method, notes=beside.row_notes(cells)), results.parameters(model, method))
        for method, cells in of_method.items()
    ]
    for budget in budgets:
        averages = [results.average(model, budget, method, shared[budget]) for method in methods]
        for cells, method, average in zip(rows, methods, averages, strict=True):
            other = (budget == ZERO_SHOT) != is_zero_shot(method)
            why = _why(results, model, budget, method)
            cells.append(TableCell("") if other else average_cell(average, beside, printed[method, budget], why))
    header = [TableCell(b, below=f"{many(len(shared[b]), 'dataset')}") for b in budgets]
    return Table(
        f"averages-{identifier(model)}",
        f"{model}: {results.measured} averaged over the datasets that every compared method has",
        row("Method", "Trained parameters", *header),
        rows,
        [],
        marks,
        [line for budget in budgets for line in left_out_line(budget, common[budget][1])],
    )


def accuracy_cell(results: Results, beside: Beside, key: Key) -> TableCell:
    """Return a cell with its interval, each seed's value in its tooltip, and the paper's value below."""
    estimate, runs, paper = results.estimate(key), results.runs(key), beside.cell(key)
    ours = estimate.mean if estimate else None
    printed = PaperAverage(paper.value, (paper,)).beside(ours) if paper else ""
    states = [f"seed {run.seed if run.seed is not None else '?'}: {_value(run.accuracy) or run.status}" for run in runs]
    title = "; ".join([" ".join(key), *states])
    if estimate is None:
        text = results.why_missing(key) if runs else ""
        return TableCell(_cut(text), printed, title if runs else "", None, missing=True)
    short = sum(run.state == FINISHED for run in runs) < len(runs)
    partly = f"{len(estimate.values)} of {len(runs)} seeds" if short else ""
    if estimate.half is None:
        title += "; one seed: no interval"
    idle = IDLE if results.idle(key) else ""
    return TableCell(estimate_text(estimate), joined(idle, partly, printed), title, estimate.mean)


def average_cell(average: Average | None, beside: Beside, paper: PaperAverage | None, why: str) -> TableCell:
    """Return an average, the paper's below it, in its tooltip what was averaged; or why there is none."""
    printed = paper.beside(average.estimate.mean if average else None) if paper else ""
    marks = beside.average_notes(paper) if paper else ()
    if average is None:
        return TableCell(_cut(why), printed, why, missing=True, notes=marks)
    estimate = average.estimate
    text = [f"over {', '.join(average.datasets)}"]
    if estimate.half is None:
        text.append("fewer than two seeds on all of them, so no interval")
    else:
        text += [f"seed {seed}: {_value(value)}" for seed, value in zip(average.seeds, estimate.values, strict=True)]
    unused = set(average.all_seeds) - set(average.seeds)
    some = bool(unused) and estimate.half is not None
    if some:
        text.append(f"seeds that not every dataset has are left out: {', '.join(map(str, sorted(unused)))}")
    partly = f"{len(average.seeds)} of {len(average.all_seeds)} seeds" if some else ""
    return TableCell(estimate_text(estimate), joined(partly, printed), "; ".join(text), estimate.mean, notes=marks)


def _plain(results: Results, budget: str, datasets: Sequence[str], shared: Sequence[str]) -> list[list[TableCell]]:
    """Return a row for each plain classifier of a budget; its average is over the datasets of the others."""
    rows = []
    here = [one for one in results.sweep.baselines if one.budget == budget and one.dataset in datasets]
    for name in dict.fromkeys(one.name for one in here):
        found: dict[str, list[Baseline]] = {
            d: [one for one in here if (one.name, one.dataset) == (name, d)] for d in datasets
        }
        means = {d: Estimate(tuple(100 * one.score for one in some)) for d, some in found.items() if some}
        cells = []
        for dataset in datasets:
            some, estimate = found[dataset], means.get(dataset)
            partly = f"{some[0].train:,} of {some[0].of:,} samples" if some and some[0].train < some[0].of else ""
            shown = TableCell(estimate_text(estimate), partly, sort=estimate.mean) if estimate else TableCell("")
            cells.append(shown)
        whole = [means[dataset].mean for dataset in shared if dataset in means]
        mean = fmean(whole) if whole and len(whole) == len(shared) else None
        average = TableCell("") if mean is None else TableCell(f"{mean:.1f}", sort=mean)
        rows.append(row(name, TableCell(budget, sort=results.plan.budgets.index(budget)), None, *cells, average))
    return rows


def joined(*marks: str) -> str:
    """Return the second line of a cell: what it has of marks, such as how many seeds, and a printed value."""
    return " · ".join(filter(None, marks))


def estimate_text(estimate: Estimate) -> str:
    """``84.3 ± 0.5``, or the mean alone of one seed."""
    return f"{estimate.mean:.1f}" + ("" if estimate.half is None else f" ± {estimate.half:.1f}")


def left_out_line(budget: str, left_out: dict[str, list[str]]) -> list[str]:
    """Return lines that name the datasets left out of a budget's averages, and the methods without a run there."""
    if not left_out:
        return []
    text = "; ".join(f"{dataset} (no finished run of {', '.join(methods)})" for dataset, methods in left_out.items())
    return [f"{budget}: the averages leave out {text}."]


def identifier(label: str) -> str:
    """Return a label as part of a name of files and anchors; `build` appends numbers to equal ones."""
    return re.sub(r"[\W_]+", "-", label.lower()).strip("-")[:_LONGEST] or "unnamed"


def _cells(results: Results, model: str, budget: str, method: str) -> list[Key]:
    return [key for d in results.plan.datasets if results.runs(key := Key(model, d, budget, method))]


def _why(results: Results, model: str, budget: str, method: str) -> str:
    """Why a method has no average, if it has none."""
    cells = _cells(results, model, budget, method)
    if any(map(results.finished, cells)):
        return "no dataset in common"
    return " / ".join(dict.fromkeys(map(results.why_missing, cells))) or "not run"


def _printed(beside: Beside, keys: Sequence[Key]) -> list[PaperCell]:
    return [cell for key in keys if (cell := beside.cell(key))]


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHORT + 8 else text[: _SHORT + 7].rstrip() + "…"
