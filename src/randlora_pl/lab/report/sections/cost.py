"""Parameters, time and memory of each method, in the layout of Table 10."""

from statistics import fmean

from pandas import DataFrame, Series

from randlora_pl.lab.paper import column_of
from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.document import Printed, Table, TableCell, row
from randlora_pl.lab.report.sections.accuracy import identifier
from randlora_pl.lab.report.sections.paper_comparison import Beside

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
