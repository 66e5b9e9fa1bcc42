"""Plots like the paper's Figures 1 (accuracy against parameters) and 2 and 3 (accuracy against data, with memory)."""

import re
from collections.abc import Sequence
from math import nan
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from randlora_pl.experiments.report.document import Picture, many
from randlora_pl.experiments.report.plan import Key
from randlora_pl.experiments.report.results import Results
from randlora_pl.experiments.report.sections.accuracy import identifier
from randlora_pl.experiments.report.sections.paper_comparison import Beside
from randlora_pl.experiments.report.statistics import Estimate
from randlora_pl.experiments.sweep.description import ZERO_SHOT, is_zero_shot

COLOURS = (
    *("#2f7fd1", "#d9711c", "#2a9d5c", "#c154a8", "#80868f", "#8a6bd6", "#d24b4b", "#1a8f9a"),
    *("#a9744f", "#7f8a14", "#d8588a", "#5b7fa6"),
)
"""Readable on white and on a dark page: every one has a contrast of at least 3 to both."""
WIDTH = 5.6
"""Inches: words stay readable on a phone, where a plot is shrunk to the screen."""
MARKERS = "osD^vP*Xhp<>"
BARS = "bars are 95 % confidence intervals over seeds, a point without one is of one seed"
INK = "#6f7580"
"""Axes and words in PNG and SVG files; a page shows them in its own colour instead."""


def style(results: Results, method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in every plot."""
    position = results.plan.methods.index(method)
    thick = 2.4 if results.is_randlora(method) else 1.5
    return {"color": COLOURS[position % len(COLOURS)], "marker": MARKERS[position % len(MARKERS)], "linewidth": thick}


def budget_picture(results: Results, beside: Beside, model: str) -> Picture | None:
    """Draw accuracy against the data budget, memory of each method as bars; None where nothing can be averaged.

    Every point is over the same data sets: those that each method of the plot has at every budget where it has any.
    The paper's averages over them are dashed.
    """
    budgets = results.trained_budgets(model)
    methods = [m for m in results.plan.methods if any(m in results.methods(model, budget) for budget in budgets)]
    shared, left_out = results.common(model, budgets)
    if not shared or not methods:
        return None
    memory = {m: _memory(results, model, m, shared, budgets) for m in methods}
    known = {method: value for method, value in memory.items() if value}
    tall = 0.26 * len(known) + 0.2 if known else 0.0
    figure = Figure(figsize=(WIDTH, 3.6 + tall), layout="constrained")
    panels = figure.subplots(2 if known else 1, squeeze=False, height_ratios=(2.8, tall) if known else None)[:, 0]
    top, handles, dashed, described_lines = panels[0], [], False, []
    for number, method in enumerate(methods):
        found = [(n, results.average(model, budget, method, tuple(shared))) for n, budget in enumerate(budgets)]
        points = [(n, average.estimate) for n, average in found if average]
        if not points:
            continue
        # so that intervals do not hide each other
        shift = min(0.05, 0.4 / len(methods)) * (number - (len(methods) - 1) / 2)
        look = style(results, method)
        x = [n + shift for n, _ in points]
        halves = [_bar(estimate) for _, estimate in points]
        drawn = top.errorbar(x, [e.mean for _, e in points], halves, label=method, capsize=2, markersize=5, **look)
        handles.append(drawn)
        printed = [(n, beside.average(model, budgets[n], method, shared)) for n, _ in points]
        line = [(n + shift, paper.value) for n, paper in printed if paper]
        if line:
            dashed = True
            top.plot(*zip(*line, strict=True), linestyle="--", alpha=0.75, color=look["color"], linewidth=1.1)
        described_lines.append(f"{method} " + ", ".join(f"{budgets[n]} {estimate.mean:.1f}" for n, estimate in points))
    zero = _zero_shot(results, model, shared)
    if zero is not None:
        low, high = top.get_ylim()
        if zero >= low - (high - low):
            handles.append(top.axhline(zero, color=INK, linestyle=":", linewidth=1.3, label="zero-shot"))
        else:  # it would press the curves into one
            handles += top.plot([], [], color=INK, linestyle=":", linewidth=1.3, label=f"zero-shot: {zero:.1f}, below")
    if dashed:
        handles += top.plot([], [], linestyle="--", color=INK, linewidth=1.1, label="the paper's, same data sets")
    top.set_xticks(range(len(budgets)), budgets)
    top.set_xlim(-0.5, len(budgets) - 0.5)
    top.set(xlabel="training data", ylabel="test accuracy, %")
    if known:
        _bars(panels[1], results, known, _memory_title(results, model))
    _legend(figure, handles)
    count = many(len(shared), "data set")
    caption = f"{model}: accuracy against training data, averaged over {count}; {BARS}"
    caption += f". Left out: {', '.join(left_out)}." if left_out else "."
    missing = [method for method in methods if method not in known]
    caption += f" Memory was not measured for {', '.join(missing)}." if missing else ""
    described = f"Average accuracy in percent over {', '.join(shared)}: {'; '.join(described_lines)}."
    return Picture(f"data-{identifier(model)}", caption, described, figure)


def parameter_picture(results: Results, family: str, models: Sequence[str]) -> Picture | None:
    """Draw accuracy against trained parameters of a family, a line for each kind of adapter; None without any.

    At the largest budget that has results, over the data sets that every method of a model has there.
    """
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    panel = figure.subplots()
    handles: dict[str, Any] = {}
    described_lines, named = [], []
    ends, fills = ["-", "--", "-.", ":"], ["full", "none", "left", "bottom"]  # of the first model, the second ...
    for number, model in enumerate(models):
        budgets = [b for b in results.trained_budgets(model) if results.common(model, [b])[0]]
        if not budgets:
            continue
        budget = budgets[-1]
        shared, left_out = results.common(model, [budget])
        kinds: dict[str, list[tuple[int, str, Any]]] = {}
        for method in results.methods(model, budget):
            size, average = results.parameters(model, method), results.average(model, budget, method, tuple(shared))
            if size and average:
                kinds.setdefault(_line(results, method), []).append((size, method, average.estimate))
        for points in kinds.values():
            points.sort(key=lambda point: point[0])
            look = style(results, points[0][1]) | {"linestyle": ends[number % 4]}
            panel.plot([p[0] for p in points], [p[2].mean for p in points], **(look | {"marker": "", "alpha": 0.6}))
            for size, method, estimate in points:
                mark = style(results, method) | {"linewidth": 1.2, "linestyle": "none", "fillstyle": fills[number % 4]}
                drawn = panel.errorbar([size], [estimate.mean], [_bar(estimate)], capsize=2, label=method, **mark)
                handles.setdefault(method, drawn)
                described_lines.append(f"{model} {method}: {size:,} parameters, {estimate.mean:.1f} %")
        left = f"; left out: {', '.join(left_out)}" if left_out else ""
        named.append(f"{model} at {budget} ({many(len(shared), 'data set')}{left})")
    if not described_lines:
        return None
    if len(named) > 1:
        for number, model in enumerate(models):
            look = {"linestyle": ends[number % 4], "fillstyle": fills[number % 4], "marker": "o", "linewidth": 1.5}
            handles[model] = panel.plot([], [], color=INK, label=model, **look)[0]
    _log_axis(panel)
    panel.set(xlabel="trained parameters", ylabel="test accuracy, %")
    _legend(figure, list(handles.values()))
    caption = f"{family}: accuracy against trained parameters, {', '.join(named)}; {BARS}."
    return Picture(f"parameters-{identifier(family)}", caption, f"{'; '.join(described_lines)}.", figure)


def _bar(estimate: Estimate) -> float:
    """Half of the interval; not a number, which draws nothing, where there is none: a bar of no length would lie."""
    return nan if estimate.half is None else estimate.half


def _line(results: Results, method: str) -> str:
    """Return the methods of one line: the same adapter at other ranks, but not variants with a name of their own.

    The part of a label in brackets, such as ``(matched to RandLoRA-6)``, is about the rank.
    """
    words = re.sub(r"[\W\d_]+", " ", re.sub(r"\([^)]*\)", " ", method)).split()
    return " ".join([results.kind(method), *words])


def _legend(figure: Figure, handles: list[Any]) -> None:
    """Draw the legend below, in as many columns as fit; axes and text in one color."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = 3 if longest < 20 else 2 if longest < 34 else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, labelcolor=INK)
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(handles) // columns))
    figure.set_layout_engine("constrained", rect=(0.01, 0.01, 0.98, 0.98))
    for panel in figure.axes:
        panel.grid(alpha=0.25, color=INK, axis="x" if panel.patches else "both")  # bars need no lines along them
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, which="both", labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(INK)
        for words in (panel.xaxis.label, panel.yaxis.label):
            words.set(color=INK, fontsize=9)


def _log_axis(panel: Any) -> None:
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    low, high = (low / 1.6, high * 1.6) if high / low < 3 else (low, high)  # room for more than one tick
    panel.set_xlim(low, high)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def short_count(value: float) -> str:
    """``5.2M``, ``141k``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def _zero_shot(results: Results, model: str, datasets: Sequence[str]) -> float | None:
    """Return the untrained model over the same data sets, from its own cells; None unless it has all of them."""
    methods = filter(is_zero_shot, results.plan.methods)
    found = (results.average(model, ZERO_SHOT, method, tuple(datasets)) for method in methods)
    return next((average.estimate.mean for average in found if average), None)


def _memory(results: Results, model: str, method: str, datasets: Sequence[str], budgets: Sequence[str]) -> float:
    runs = [run for d in datasets for b in budgets for run in results.finished(Key(model, d, b, method))]
    values = [value for run in runs if (value := run.number("peak_memory_bytes"))]
    return fmean(values) / 1e9 if values else 0.0


def _memory_title(results: Results, model: str) -> str:
    devices = {run.device for run in results.sweep.finished if run.key.model == model}
    return "peak resident set of the process, GB" if devices <= {"cpu"} else "peak memory in training, GB"


def _bars(panel: Any, results: Results, memory: dict[str, float], title: str) -> None:
    positions = range(len(memory))
    panel.barh(positions, memory.values(), color=[style(results, method)["color"] for method in memory], height=0.7)
    panel.set_yticks(positions, memory)
    panel.invert_yaxis()
    panel.set_xlabel(title)
    panel.set_xlim(0, 1.15 * max(memory.values()))
    panel.xaxis.set_major_locator(MaxNLocator(6))
    for position, value in zip(positions, memory.values(), strict=True):
        panel.annotate(f" {value:.2f}", (value, position), va="center", fontsize=8, color=INK)
