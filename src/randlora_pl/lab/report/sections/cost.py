"""Parameters, time and memory of each method, in the layout of Table 10."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean

from randlora_pl.lab.paper import PaperCell, column_of
from randlora_pl.lab.report.document import Table, TableCell, row
from randlora_pl.lab.report.results import Results
from randlora_pl.lab.report.runs import FinishedRun
from randlora_pl.lab.report.sections.accuracy import identifier
from randlora_pl.lab.report.sections.paper_comparison import Beside

_REFERENCES = ("FullFineTuning", "LoRA")
"""What times and memory are percents of: as in Table 10 full fine-tuning, LoRA where that was not run."""

_MEASURED = {"ImageNet, seconds": ("fit_seconds", 1.0), "ImageNet, peak memory in GB": ("peak_memory_bytes", 1e-9)}
"""Columns of appendix B.3, of one dataset and one budget."""

RESIDENT = (
    "Memory on a CPU is the peak resident set of the process, including the program and the data. On Linux it is reset "
    "for each cell, but includes what earlier cells of the process left behind. On other systems it never decreases "
    "from one cell to the next."
)
ALLOCATED = "Memory on a GPU is the peak allocation of PyTorch during training."


def cost_table(results: Results, beside: Beside, model: str) -> Table | None:
    """Cost of each method of a model; None where no run has a measurement of it.

    Percents are means over the cells (dataset, budget, seed) that the method and the reference both have on the same
    device, each divided by the reference's value of the same cell.
    """
    runs: dict[tuple[str, str], list[FinishedRun]] = defaultdict(list)
    for run in results.sweep.finished:
        if run.key.model == model and run.number("fit_seconds"):
            runs[run.key.method, run.device].append(run)
    if not runs:
        return None
    devices = sorted({device for _, device in runs})
    has_percents = any(beside.parameters(model, method) for method in results.plan.methods)
    printed = {method: beside.measured(model, method) for method in results.plan.methods}
    columns = list(dict.fromkeys(chain(*printed.values())))
    there = [cell for cells in printed.values() for cell in cells.values()]
    budget = there[0].budget if there else ""
    rows, shown, below = [], [], []
    for device in devices:
        reference = _reference(results, [m for m in results.plan.methods if (m, device) in runs])
        base = runs.get((reference or "", device), [])
        for method in results.plan.methods:
            if not (here := runs.get((method, device), [])):
                continue
            paper = [cell for cell in beside.cost(model, method) if cell]
            shown += paper
            time, memory = beside.cost(model, method)
            rows.append(row(
                TableCell(method, notes=beside.row_notes(paper)),
                device or "unknown",
                results.parameters(model, method),
                *([_trained_percent(results, beside, model, method)] if has_percents else []),
                _relative(here, base, "fit_seconds", time),
                _relative(here, base, "peak_memory_bytes", memory),
                _mean([run.number("fit_seconds") for run in here], "{:,.1f}"),
                _mean([run.per_second for run in here], "{:,.0f}"),
                _mean([1e-9 * (run.number("peak_memory_bytes") or 0) for run in here], "{:,.2f}"),
                *(_measured(results, here, column, budget, printed[method].get(column)) for column in columns),
                len(here),
            ))  # fmt: skip
        named = f"On {device}, percents" if len(devices) > 1 else "Percents"
        below.append(
            f"{named} are relative to {reference} with the same dataset, budget and seed."
            if reference
            else f"{named} are missing: neither full fine-tuning nor LoRA was run."
        )
    below += [RESIDENT] if "cpu" in devices else []
    below += [ALLOCATED] if any(device != "cpu" for device in devices) else []
    unit = "Images" if any(run.number("images_per_second") for run in chain(*runs.values())) else "Texts"
    header = ["Method", "Device", "Trained parameters", *["% of all"] * has_percents, "Training time, %", "Memory, %"]
    header += ["Seconds per run", f"{unit} per second", "Peak memory, GB", *columns, "Runs"]
    notes = {"Memory, %": shown} | dict.fromkeys(columns, there)
    titles = [TableCell(title, notes=beside.column_notes(notes.get(title, []))) for title in header]
    return Table(
        f"cost-{identifier(model)}",
        f"{model}: parameters, time and memory",
        [replace(title, below=budget) if title.text in columns else title for title in titles],
        rows,
        [],
        beside.caption_notes(shown),
        below,
        left=2,
    )


def _reference(results: Results, methods: list[str]) -> str | None:
    found = (method for kind in _REFERENCES for method in methods if results.kind(method) == kind)
    return next(found, None)


def _relative(runs: list[FinishedRun], base: list[FinishedRun], name: str, paper: PaperCell | None) -> TableCell:
    """Percent of the reference, and the paper's below."""
    printed = f"paper {paper.value:g}" if paper else ""
    of = {(*run.key[:3], run.seed): run.number(name) for run in base}
    pairs = [(run.number(name), of.get((*run.key[:3], run.seed))) for run in runs]
    ratios = [100 * ours / theirs for ours, theirs in pairs if ours and theirs]
    if not ratios:
        text = "no reference" if any(ours for ours, _ in pairs) else "not measured"
        return TableCell(text, printed, missing=True)
    mean = fmean(ratios)
    title = f"mean of {len(ratios)} cells, from {min(ratios):.0f} to {max(ratios):.0f}"
    return TableCell(f"{mean:.0f}", f"{printed} ({mean - paper.value:+.0f})" if paper else "", title, mean)


def _measured(
    results: Results, runs: list[FinishedRun], column: str, budget: str, paper: PaperCell | None
) -> TableCell:
    """Mean of the runs of a column's dataset and a budget, and the paper's value below."""
    (name, factor), dataset = _MEASURED[column], column.partition(", ")[0]
    here = [run for run in runs if column_of(results.plan.paper_name(run.key.dataset)) == dataset]
    ours = _mean([factor * (run.number(name) or 0) for run in here if run.key.budget == budget], "{:,.1f}")
    if paper is None:
        return ours
    difference = "" if ours.sort is None else f" ({ours.sort - paper.value:+,.1f})"
    return replace(ours, below=f"paper {paper.value:,g}{difference}")


def _trained_percent(results: Results, beside: Beside, model: str, method: str) -> TableCell:
    """Trained of all parameters in percent, and what the paper prints."""
    percent, printed = results.trained_percent(model, method), beside.parameters(model, method)
    below = f"paper {printed}" if printed else ""
    return TableCell("", below) if percent is None else TableCell(f"{percent:.2g}", below, sort=percent)


def _mean(found: Sequence[float | None], form: str) -> TableCell:
    values = [value for value in found if value]
    if not values:
        return TableCell("not measured", missing=True)
    mean = fmean(values)
    title = f"mean of {len(values)} runs, from {form.format(min(values))} to {form.format(max(values))}"
    return TableCell(form.format(mean), title=title, sort=mean)
