"""Training of each method: its learning rate, steps, time, parameters, memory, and the rank of its update.

Table 2 of the paper claims a relation of rank and accuracy.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import floor, log
from statistics import fmean

from pandas import DataFrame, Series, isna

from randlora_pl.lab.paper import column_of
from randlora_pl.lab.report import (
    Estimate,
    Printed,
    Table,
    TableCell,
    formatted,
    many,
    mean_cell,
    partial_rank_correlation,
    rank_correlation,
    row,
)
from randlora_pl.lab.report.accuracy import Beside, identifier
from randlora_pl.lab.report.cells import Key, Sweep
from randlora_pl.lab.report.collect import DEFAULT, PAPER, TRAINED, TYPED, VALIDATION, losses
from randlora_pl.run.options.classes import rate_name
from randlora_pl.sweep import HEAD, LOWEST
from randlora_pl.sweep.margins import BREAKS, next_higher, rule_text

EDGE = "best at the edge of its search"


def untuned(sweep: Sweep, model: str, methods: Sequence[str]) -> str:
    """Why methods cannot be compared, such as ``LoRA default, RandLoRA-6 typed``; empty if they can be."""
    runs = {method: sweep.select(model=model, method=method) for method in methods}
    rules = {rule for rates in runs.values() for rule in rates["rate_rule"]}
    if len(rules) == 1 and "" not in rules:
        searched = sweep.plan.tuned.get("methods", {}) if rules != {PAPER} else {}
        edges = [method for method in methods if searched.get(method, {}).get("interior") is False]
        return ", ".join(f"{method} {EDGE}" for method in edges)
    hows = {method: " and ".join(rates["rate_chosen_by"].unique()) for method, rates in runs.items()}
    other = ", but of several searches" if set(hows.values()) == {VALIDATION} else ""
    return ", ".join(f"{method} {how}" for method, how in hows.items()) + other


def heads_tied(sweep: Sweep, model: str, methods: Sequence[str]) -> bool:
    """Return True if a head of two methods learned at its adapter's rate, unsearched, and the other's at another."""
    runs = [sweep.select(model=model, method=method) for method in methods]
    rates = (some[HEAD].astype(float).fillna(some["learning_rate"].astype(float)) for some in runs)
    first, second = ({f"{rate:.5g}" for rate in each} for each in rates)
    return first != second and any(some["tied"].eq(True).any() for some in runs)


def rate_table(sweep: Sweep) -> Table | None:
    """Return the rates of every method, with the cells of each if there are several; None if nothing was trained."""
    trained = sweep.finished.dropna(subset="rate_chosen_by")
    rows = []
    columns = ["learning_rate", "rate_chosen_by", "rate_rule", HEAD]
    tuned, searched = sweep.plan.tuned, "rule" in sweep.plan.tuned
    heads = searched or bool(trained[HEAD].notna().any())
    for model in sweep.plan.models:
        for method in sweep.plan.methods:
            runs = trained[(trained["model"] == model) & (trained["method"] == method)]
            rates = runs.groupby(columns, dropna=False, sort=False)
            name = rate_name(sweep.kinds[method], None)
            options = ["" if name == HEAD else name, HEAD] if heads else [name]
            for (rate, how, _, head), some in rates:
                places = (some["dataset"] + " " + some["budget"]).unique()
                where = "everywhere" if len(rates) == 1 else ", ".join(places)
                values = ({} if isna(head) else {HEAD: head}) | {name: rate}
                cells = [rate_cell(values[option]) if option in values else TableCell("") for option in options]
                record = tuned if how == VALIDATION else {}
                cells += [TableCell(*next_higher(record, method, option)) for option in options * searched]
                rows.append(row(method, model, how, where, *cells))
    if not rows:
        return None
    chose = "the best rate that randlora-pl tune tried on validation samples."
    if tuned.get("rule") == LOWEST:
        chose = f"the rates that randlora-pl tune chose on validation samples. {rule_text(tuned)}"
    meanings = {
        PAPER: "paper: the paper's rate for the method.",
        VALIDATION: f"validation: {chose}",
        TYPED: "typed: set by hand in the sweep, not tuned.",
        DEFAULT: "default: the default rate of the method, not tuned.",
    }
    below = [meaning for how, meaning in meanings.items() if (trained["rate_chosen_by"] == how).any()]
    if (trained["rate_chosen_by"] == VALIDATION).any():
        names = {name: ", ".join(map(str, tuned.get(name) or ["?"])) for name in ("datasets", "budgets", "seeds")}
        made = " ".join(str(tuned[name])[:12] for name in ("version", "git_commit") if tuned.get(name))
        by = f", by randlora-pl {made}" if made else ""
        below.append(
            f"The search: {tuned.get('monitor', 'val/acc')} on {names['datasets']} at {names['budgets']}, seeds "
            f"{names['seeds']}{by}. One rate for all datasets and budgets."
        )
        below += [f"Next higher: points against the chosen rate over common seeds. {BREAKS}"] * searched
    titles = ["Adapter rate", "Head rate"] if heads else ["Learning rate"]
    titles += ["Next higher adapter rate", "Next higher head rate"] * searched
    header = row("Method", "Model", "Chosen by", "Where", *titles)
    return Table("rates-methods", "Learning rates and how they were chosen", header, rows, below, left=4)


def rate_cell(rate: float) -> TableCell:
    """Return a cell with a rate."""
    return TableCell("unknown") if isna(rate) else TableCell(f"{rate:g}", sort=rate)


def at(curve: list[float], share: Fraction) -> float | None:
    """Return the mean loss of the last part before a share of a run's steps; None before the end of the first part."""
    number = floor(share * len(curve))
    return curve[number - 1] if number else None


_SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))


def training_table(sweep: Sweep, model: str) -> Table | None:
    """Return the steps and time to the final loss of a reference; None if no two methods logged such a loss."""
    runs, rows = logged_runs(sweep, model), []
    for method, reference in by_reference(sweep, model).items():
        itself, pairs = method == reference, _pairs(runs, method, reference)
        if len(pairs):
            never = int(pairs["never"].sum())
            rows.append(row(
                method,
                "itself" if itself else reference,
                over_datasets(pairs, "steps", ".0f"),
                TableCell(f"{never} of {len(pairs)}", sort=never / len(pairs)),
                over_datasets(pairs, "time", ".0f"),
                over_datasets(pairs, "whole", ".0f"),
                *(TableCell("") if itself else over_datasets(pairs, when, "+.3f") for when in _SHARES),
            ))  # fmt: skip
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
    caption = f"{model}: training loss compared with a reference"
    return Table(f"training-{identifier(model)}", caption, header, rows, below, left=2)


def by_reference(sweep: Sweep, model: str) -> dict[str, str]:
    """Return the method whose loss is the mark of each method of a model, which may be itself."""
    logged = logged_runs(sweep, model)["method"].unique()
    kinds = {method: kind_of_loss(sweep, method) for method in sweep.plan.methods if method in logged}
    groups = {}
    for method, kind in kinds.items():
        alike = [one for one in kinds if kinds[one] == kind]
        size = sweep.parameters(model, method)
        if size and (reference := nearest(sweep, model, alike, size, method)):
            groups[method] = reference
    return groups


def logged_runs(sweep: Sweep, model: str) -> DataFrame:
    """Return the finished runs of a model that logged their loss, with its means in the column ``losses``."""
    runs = sweep.select(model=model).dropna(subset=TRAINED)
    runs = runs.assign(losses=runs[TRAINED].map(losses).astype(object))
    return runs[runs["losses"].map(bool).astype(bool)]


def _pairs(runs: DataFrame, method: str, reference: str) -> DataFrame:
    """Compare the runs of a method with the runs of its reference on the same dataset, budget and seed."""
    ours, theirs = (runs[runs["method"] == name] for name in (method, reference))
    pairs = ours.merge(theirs, on=["dataset", "budget", "seed"], suffixes=("", " of reference"))
    curves = list(zip(pairs["losses"], pairs["losses of reference"], strict=True))
    # the share of a run's steps after which its loss is at most the last one of the reference; None where it never is
    parts = [[loss <= other[-1] for loss in curve] for curve, other in curves]
    shares = [Fraction(part.index(True) + 1, len(part)) if any(part) else None for part in parts]
    table = pairs[["dataset"]].assign(steps=[100 * float(share or 1) for share in shares])
    table["whole"] = _percents(pairs, "fit_seconds")
    table["time"] = table["steps"] * table["whole"] / 100
    table["never"] = [share is None for share in shares]
    for when in _SHARES:
        ours, theirs = (Series([at(both[n], when) for both in curves], dtype=float) for n in (0, 1))
        table[when] = ours - theirs
    return table


def _percents(pairs: DataFrame, name: str) -> Series:
    """Return a cost in percent of the reference's, where both ran on the same device; on a CPU, on the same machine."""
    ours, theirs = (pairs[key].where(pairs[key] > 0) for key in (name, f"{name} of reference"))
    alike = (pairs["device"] != "cpu") | (pairs[["machine", "machine of reference"]].nunique(axis=1) < 2)
    return (100 * ours / theirs).where(alike & (pairs["device"] == pairs["device of reference"]))


def over_datasets(table: DataFrame, column: object, form: str, nothing: str = "not measured") -> TableCell:
    """Return the mean over datasets of the means of a column, with its interval, and each dataset in the tooltip."""
    known = table[["dataset", column]].dropna()
    means = known.groupby("dataset", sort=False)[column].agg(fmean)
    if means.empty:
        return TableCell(nothing, missing=True)
    title = "; ".join(f"{dataset} {formatted(mean, form)}" for dataset, mean in means.items())
    return mean_cell(Estimate(tuple(means)), title, form)


def nearest(sweep: Sweep, model: str, methods: Sequence[str], size: int, method: str = "") -> str | None:
    """Return the LoRA, or else full fine-tuning, of the nearest size; of equally near ones ``method`` itself."""
    for kind in ("LoRA", "FullFineTuning"):
        sizes = {one: sweep.parameters(model, one) or 1 for one in methods if sweep.kinds[one] == kind}
        if sizes:
            return min(sizes, key=lambda one: (abs(log(sizes[one] / size)), one != method))
    return None


def kind_of_loss(sweep: Sweep, method: str) -> tuple[object, ...]:
    """Return what must be equal for two training losses to be comparable: the task and its options of the loss."""
    tasks = sorted(sweep.select(method=method)["task"].astype(str).unique())
    options = sweep.plan.methods[method].get("set") or {}
    return tasks, sorted((name, str(value)) for name, value in options.items() if name.startswith("model.loss"))


RESIDENT = (
    "Memory on a CPU is the peak resident set of the process, including the program and the data. On Linux it is reset "
    "for each cell, but includes what earlier cells of the process left behind. On other systems it never decreases "
    "from one cell to the next."
)
ALLOCATED = "Memory on a GPU is the peak allocation of PyTorch during training."


def cost_table(sweep: Sweep, beside: Beside, model: str) -> Table | None:
    """Cost of each method of a model; None if no run has a measurement of it.

    Percents are means over the cells (dataset, budget, seed) that the method and the reference both have on the same
    device (of a CPU, the same machine), each divided by the reference's value of the same cell.
    """
    runs = sweep.select(model=model)
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
        on = runs[runs["device"] == device]
        here = {method: some for method in sweep.plan.methods if len(some := on[on["method"] == method])}
        # as in Table 10 full fine-tuning, LoRA where that was not run
        reference = next((m for kind in ("FullFineTuning", "LoRA") for m in here if sweep.kinds[m] == kind), None)
        base = here[reference] if reference else runs[:0]
        for method, some in here.items():
            time, memory = beside.cost(model, method)
            size, paper = sweep.parameters(model, method), beside.parameters(model, method)
            counted = sweep.select(model=model, method=method)
            counted = counted[(counted["trainable_parameters"] == size) & (counted["total_parameters"] > 0)]
            percent = TableCell("", f"paper {paper}" if paper else "")
            if size and len(counted):
                percent.sort = 100 * size / float(counted["total_parameters"].iloc[0])
                percent.text = f"{percent.sort:.2g}"
            rows.append(row(
                method,
                device or "unknown",
                size,
                *([percent] if has_percents else []),
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
    ratios = _percents(pairs, name).dropna()
    if ratios.empty:
        why = "no reference" if (runs[name] > 0).any() else "not measured"
        return TableCell(why, printed, missing=True, paper=paper)
    mean = fmean(ratios)
    title = f"mean of {len(ratios)} cells, from {ratios.min():.0f} to {ratios.max():.0f}"
    below = f"{printed} ({mean - paper.value:+.0f})" if paper else ""
    return TableCell(f"{mean:.0f}", below, title, mean, paper=paper)


def _measured(sweep: Sweep, runs: DataFrame, column: str, budget: str, paper: Printed | None) -> TableCell:
    """Mean of the runs of a column's dataset and a budget, and the paper's value below."""
    dataset, _, what = column.partition(", ")  # columns of appendix B.3, of one dataset and one budget
    name = {"seconds": "fit_seconds", "peak memory in GB": "gigabytes"}[what]
    there = runs["dataset"].map(lambda label: column_of(sweep.plan.paper_name(label)) == dataset)
    cell = _mean(runs[there & (runs["budget"] == budget)][name], ",.1f")
    if paper:
        difference = "" if cell.sort is None else f" ({cell.sort - paper.value:+,.1f})"
        cell.below, cell.paper = f"paper {paper.value:,g}{difference}", paper
    return cell


def _mean(values: Series, form: str) -> TableCell:
    known = values[values > 0]
    if known.empty:
        return TableCell("not measured", missing=True)
    mean = fmean(known)
    title = f"mean of {len(known)} runs, from {known.min():{form}} to {known.max():{form}}"
    return TableCell(f"{mean:{form}}", title=title, sort=mean)


_RANKS = ("spectrum/rank", "spectrum/effective_rank", "spectrum/stable_rank")


def _leveled(name: str, ranks: list[float]) -> list[float]:
    """Return ranks with nearly full ones equal, since which is higher is rounding; other metrics as they are."""
    highest = (1 - 0.05) * max(ranks, default=0)
    return [min(rank, highest) for rank in ranks] if name == _RANKS[0] else ranks


def partial_table(sweep: Sweep) -> Table | None:
    """Return the correlations of ranks with accuracy at equal parameters; None where too few runs have a rank.

    Spearman's correlation is over the methods of each dataset and budget, of means over seeds. Its mean and interval
    are over datasets.
    """
    rows = []
    for name, model in product([name for name in _RANKS if name in sweep.finished], sweep.plan.models):
        correlations = []
        for dataset, budget in product(sweep.plan.datasets, sweep.trained_budgets(model)):
            runs = sweep.select(model=model, dataset=dataset, budget=budget)
            points = []
            for method in sweep.methods(model, budget):
                known = _known(runs[runs["method"] == method], name)
                estimate, size = sweep.estimate(Key(model, dataset, budget, method)), sweep.parameters(model, method)
                if known and estimate and size:
                    points.append((fmean(known), estimate.mean, log(size)))
            if len(points) > 3:
                ranks, accuracies, sizes = (list(column) for column in zip(*points, strict=True))
                ranks = _leveled(name, ranks)
                values = partial_rank_correlation(ranks, accuracies, sizes), rank_correlation(ranks, accuracies)
                correlations.append((dataset, len(ranks), *values))
        cells = DataFrame(correlations, columns=["dataset", "methods", "partial", "plain"])
        partial, plain = (over_datasets(cells, column, "+.2f", "not defined") for column in ("partial", "plain"))
        if partial.sort is not None:
            fewest, most = cells["methods"].min(), cells["methods"].max()
            methods = f"{fewest} to {most}" if fewest < most else str(most)
            title = name.removeprefix("spectrum/").replace("_", " ")
            rows.append(row(title, model, partial, plain, methods, cells["dataset"].nunique()))
    if not rows:
        return None
    titles = ("Correlation at equal parameters", "Correlation for any number", "Methods", "Datasets")
    header = row("Metric of the update", "Model", *titles)
    below = [
        "Spearman's correlation over the methods that have the metric, within each dataset and budget, of means over "
        "seeds. At equal parameters it is partial: what the logarithm of the trained parameters explains is removed. "
        "Means and 95 % confidence intervals are over datasets, which share their methods. Ranks within 5 % of the "
        "highest count as equal. It does not show a cause.",
    ]
    variants = {  # of RandLoRA that train as many numbers and have a lower rank
        "a": "its sums come first, so its rank is lower, and so is the count of its free parameters",
        "b": "it has half of the terms",
    }
    controls = []
    for method, facts in sweep.plan.methods.items():
        variant = str(facts.get("variant"))
        if variant in variants and (ranks := _known(sweep.select(method=method), _RANKS[0])):
            controls.append(f"{method} ({variants[variant]}; rank {fmean(ranks):.0f})")
    if controls:
        count = many(len(controls), "control")
        below.append(f"{count} with as many trained numbers as RandLoRA: {', '.join(controls)}.")
    title = "Rank of the update against accuracy, at equal parameters"
    return Table("versus-rank-partial", title, header, rows, below, left=2)


def _known(runs: DataFrame, name: str) -> list[float]:
    """Return the values of a metric of the update; zero was not measured."""
    return [value for value in runs.get(name, ()) if value and not isna(value)]
