"""Training of each method: its learning rate, steps, time, parameters and memory."""

from collections.abc import Sequence
from fractions import Fraction
from math import log
from statistics import fmean

from pandas import DataFrame, Series, isna

from randlora_pl.lab.paper import column_of
from randlora_pl.lab.report.accuracy import identifier
from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.collect import DEFAULT, PAPER, TYPED, VALIDATION
from randlora_pl.lab.report.curves import TRAINED, at, losses, reached
from randlora_pl.lab.report.document import Printed, Table, TableCell, mean_cell, row
from randlora_pl.lab.report.paper_comparison import Beside
from randlora_pl.lab.report.statistics import Estimate, formatted

_MEANINGS = {
    PAPER: "paper: the paper's rate for the method.",
    VALIDATION: "validation: the best rate that randlora-pl tune tried on validation samples.",
    TYPED: "typed: set by hand in the sweep, not tuned.",
    DEFAULT: "default: the default rate of the method, not tuned.",
}


def untuned(sweep: Sweep, model: str, methods: Sequence[str]) -> str:
    """Why methods cannot be compared, such as ``LoRA default, RandLoRA-6 typed``; empty where they can be."""
    runs = {method: sweep.of(model=model, method=method) for method in methods}
    rules = {rule for found in runs.values() for rule in found["rate_rule"]}
    if len(rules) == 1 and "" not in rules:
        return ""
    hows = {method: " and ".join(found["rate_chosen_by"].unique()) for method, found in runs.items()}
    other = ", but of several searches" if set(hows.values()) == {VALIDATION} else ""
    return ", ".join(f"{method} {how}" for method, how in hows.items()) + other


def rate_table(sweep: Sweep) -> Table | None:
    """Return the rates of every method, with the cells of each if there are several; None if nothing was trained."""
    trained = sweep.finished.dropna(subset="rate_chosen_by")
    rows = []
    for model in sweep.plan.models:
        for method in sweep.plan.methods:
            runs = trained[(trained["model"] == model) & (trained["method"] == method)]
            rates = runs.groupby(["learning_rate", "rate_chosen_by", "rate_rule"], dropna=False, sort=False)
            for (rate, how, _), some in rates:
                places = (some["dataset"] + " " + some["budget"]).unique()
                where = "everywhere" if len(rates) == 1 else ", ".join(places)
                rows.append(
                    row(method, model, how, where, TableCell(shown_rate(rate), sort=None if isna(rate) else rate))
                )
    if not rows:
        return None
    below = [meaning for how, meaning in _MEANINGS.items() if (trained["rate_chosen_by"] == how).any()]
    if (trained["rate_chosen_by"] == VALIDATION).any():
        tuned = sweep.plan.tuned
        names = {name: ", ".join(map(str, tuned.get(name) or ["?"])) for name in ("datasets", "budgets", "seeds")}
        made = " ".join(str(tuned[name])[:12] for name in ("version", "git_commit") if tuned.get(name))
        by = f", by randlora-pl {made}" if made else ""
        below.append(
            f"The search: {tuned.get('monitor', 'val/acc')} on {names['datasets']} at {names['budgets']}, seeds "
            f"{names['seeds']}{by}. One rate for all datasets and budgets."
        )
    header = row("Method", "Model", "Chosen by", "Where", "Learning rate")
    return Table("rates-methods", "Learning rates and how they were chosen", header, rows, below, left=4)


def shown_rate(rate: float) -> str:
    """Return a rate as text of a table."""
    return "unknown" if isna(rate) else f"{rate:g}"


_SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))
_MARKS = ("LoRA", "FullFineTuning")
"""Adapters whose loss is the mark of other methods."""


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
    for kind in _MARKS:
        sizes = {one: n for one in alike if sweep.kind(one) == kind and (n := sweep.parameters(model, one))}
        if sizes and size:
            return min(sizes, key=lambda one: (abs(log(sizes[one] / size)), one != method))
    return None


def kind_of_loss(sweep: Sweep, method: str) -> tuple[object, ...]:
    """Return what must be equal for two training losses to be comparable: the task and its options of the loss."""
    tasks = sorted(sweep.of(method=method)["task"].astype(str).unique())
    options = sweep.plan.methods[method].get("set") or {}
    return tasks, sorted((name, str(value)) for name, value in options.items() if name.startswith("model.loss"))


_REFERENCES = ("FullFineTuning", "LoRA")
"""What times and memory are percents of: as in Table 10 full fine-tuning, LoRA where that was not run."""

_MEASURED = {"ImageNet, seconds": "fit_seconds", "ImageNet, peak memory in GB": "gigabytes"}
"""Columns of appendix B.3, of one dataset and one budget."""

RESIDENT = (
    "Memory on a CPU is the peak resident set of the process, including the program and the data. On Linux it is reset "
    "for each cell, but includes what earlier cells of the process left behind. On other systems it never decreases "
    "from one cell to the next."
)
ALLOCATED = "Memory on a GPU is the peak allocation of PyTorch during training."


def cost_table(sweep: Sweep, beside: Beside, model: str) -> Table | None:
    """Cost of each method of a model; None where no run has a measurement of it.

    Percents are means over the cells (dataset, budget, seed) that the method and the reference both have on the same
    device, each divided by the reference's value of the same cell.
    """
    runs = sweep.of(model=model)
    runs = runs[runs["fit_seconds"] > 0]
    if runs.empty:
        return None
    rate = runs["images_per_second"].where(runs["images_per_second"] > 0, runs["samples_per_second"])
    runs = runs.assign(gigabytes=1e-9 * runs["peak_memory_bytes"], per_second=rate)
    printed = {method: beside.measured(model, method) for method in sweep.plan.methods}
    columns = list(dict.fromkeys(column for of_method in printed.values() for column in of_method))
    budget = next((cell.cells[0].budget for of_method in printed.values() for cell in of_method.values()), "")
    has_percents = any(beside.parameters(model, method) for method in sweep.plan.methods)
    devices = sorted(runs["device"].unique())
    rows, below = [], []
    for device in devices:
        here = {
            m: some for m in sweep.plan.methods if len(some := runs[(runs["method"] == m) & (runs["device"] == device)])
        }
        reference = next((m for kind in _REFERENCES for m in here if sweep.kind(m) == kind), None)
        base = here[reference] if reference else runs[:0]
        for method, some in here.items():
            time, memory = beside.cost(model, method)
            rows.append(row(
                method,
                device or "unknown",
                sweep.parameters(model, method),
                *([_trained_percent(sweep, beside, model, method)] if has_percents else []),
                _relative(some, base, "fit_seconds", time),
                _relative(some, base, "peak_memory_bytes", memory),
                _mean(some["fit_seconds"], ",.1f"),
                _mean(some["per_second"], ",.0f"),
                _mean(some["gigabytes"], ",.2f"),
                *(_measured(sweep, some, column, budget, printed[method].get(column)) for column in columns),
                len(some),
            ))  # fmt: skip
        named = f"On {device}, percents" if len(devices) > 1 else "Percents"
        below.append(
            f"{named} are relative to {reference} with the same dataset, budget and seed."
            if reference
            else f"{named} are missing: neither full fine-tuning nor LoRA was run."
        )
    below += [RESIDENT] if "cpu" in devices else []
    below += [ALLOCATED] if any(device != "cpu" for device in devices) else []
    unit = "Images" if (runs["images_per_second"] > 0).any() else "Texts"
    header = ["Method", "Device", "Trained parameters", *["% of all"] * has_percents, "Training time, %", "Memory, %"]
    header += ["Seconds per run", f"{unit} per second", "Peak memory, GB"]
    titles = row(*header, *(TableCell(column, below=budget) for column in columns), "Runs")
    return Table(f"cost-{identifier(model)}", f"{model}: parameters, time and memory", titles, rows, below, left=2)


def _relative(runs: DataFrame, base: DataFrame, name: str, paper: Printed | None) -> TableCell:
    """Percent of the reference, and the paper's below."""
    printed = f"paper {paper.value:g}" if paper else ""
    pairs = runs.merge(base, on=["dataset", "budget", "seed"], suffixes=("", " of reference"))
    ratios = 100 * pairs[name] / pairs[f"{name} of reference"]
    ratios = ratios[(pairs[name] > 0) & (pairs[f"{name} of reference"] > 0)]
    if ratios.empty:
        return TableCell(
            "no reference" if (runs[name] > 0).any() else "not measured", printed, missing=True, paper=paper
        )
    mean = fmean(ratios)
    title = f"mean of {len(ratios)} cells, from {ratios.min():.0f} to {ratios.max():.0f}"
    below = f"{printed} ({mean - paper.value:+.0f})" if paper else ""
    return TableCell(f"{mean:.0f}", below, title, mean, paper=paper)


def _measured(sweep: Sweep, runs: DataFrame, column: str, budget: str, paper: Printed | None) -> TableCell:
    """Mean of the runs of a column's dataset and a budget, and the paper's value below."""
    dataset = column.partition(", ")[0]
    there = runs["dataset"].map(lambda name: column_of(sweep.plan.paper_name(name)) == dataset)
    cell = _mean(runs[there & (runs["budget"] == budget)][_MEASURED[column]], ",.1f")
    if paper:
        difference = "" if cell.sort is None else f" ({cell.sort - paper.value:+,.1f})"
        cell.below, cell.paper = f"paper {paper.value:,g}{difference}", paper
    return cell


def _trained_percent(sweep: Sweep, beside: Beside, model: str, method: str) -> TableCell:
    """Trained of all parameters in percent, and what the paper prints."""
    percent, printed = sweep.trained_percent(model, method), beside.parameters(model, method)
    below = f"paper {printed}" if printed else ""
    return TableCell("", below) if percent is None else TableCell(f"{percent:.2g}", below, sort=percent)


def _mean(values: Series, form: str) -> TableCell:
    known = values[values > 0]
    if known.empty:
        return TableCell("not measured", missing=True)
    mean = fmean(known)
    title = f"mean of {len(known)} runs, from {known.min():{form}} to {known.max():{form}}"
    return TableCell(f"{mean:{form}}", title=title, sort=mean)
