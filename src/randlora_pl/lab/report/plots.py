"""Plots: differences to a reference, accuracy against parameters as the paper's Figure 1, memory, and curves."""

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import filterfalse
from statistics import fmean
from textwrap import fill
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from pandas import DataFrame, isna

from randlora_pl.lab.report import Estimate, Picture, many, shown
from randlora_pl.lab.report.accuracy import Beside, identifier
from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.collect import VALIDATED, scores
from randlora_pl.lab.report.comparisons import Reference
from randlora_pl.lab.report.training import at, by_reference, kind_of_loss, logged_runs
from randlora_pl.sweep import is_zero_shot

COLOURS = (
    *("#2f7fd1", "#d9711c", "#2a9d5c", "#c154a8", "#80868f", "#8a6bd6", "#d24b4b", "#1a8f9a"),
    *("#a9744f", "#7f8a14", "#d8588a", "#5b7fa6"),
)
"""Readable on white and on a dark page: every one has a contrast of at least 3 to both."""
WIDTH = 4.6
"""Inches: words stay readable on a phone, where a plot is shrunk to the screen."""
MARKERS = "osD^vP*Xhp<>"
INK = "#6f7580"
"""Axes and words in PNG and SVG files; a page shows them in its own colour instead."""


def style(sweep: Sweep, method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in every plot; of many methods no two have both in common."""
    position = list(sweep.plan.methods).index(method)
    marker = MARKERS[(position + position // len(COLOURS)) % len(MARKERS)]
    thick = 2.4 if sweep.is_randlora(method) else 1.5
    return {"color": COLOURS[position % len(COLOURS)], "marker": marker, "linewidth": thick}


def difference_picture(sweep: Sweep, beside: Beside, here: Reference) -> Picture:
    """Draw the difference of each method to a reference: a dot with its interval for each budget.

    Printed differences over the same datasets are hollow.
    """
    budgets = [b for b in sweep.trained_budgets(here.model) if any(one.of_budget(b) for one in here.pairs.values())]
    step = 0.8 / len(budgets)
    figure, names = _rows(list(here.pairs), len(budgets), 0.8)
    panel = figure.subplots()
    handles: list[Any] = []
    described_lines, hollow = dict.fromkeys(here.pairs, ""), ""
    for number, budget in enumerate(budgets):
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": "none", "markersize": 4.5}
        look["marker"] = MARKERS[number % len(MARKERS)]
        numbered = [(n, method, one.of_budget(budget)) for n, (method, one) in enumerate(here.pairs.items())]
        points = [(n + step * (number - (len(budgets) - 1) / 2), method, e) for n, method, e in numbered if e]
        x, y = [estimate.mean for *_, estimate in points], [place for place, *_ in points]
        halves = np.array([estimate.half for *_, estimate in points], dtype=float)  # NaN, without one, draws nothing
        handles.append(panel.errorbar(x, y, xerr=halves, label=budget, elinewidth=1.3, capsize=2, **look))
        for place, method, estimate in points:
            described_lines[method] += f" {budget} {shown(estimate, '+.1f')}"
            shared = [dataset for dataset, b in here.pairs[method].cells if b == budget]
            printed = [beside.average(here.model, budget, name, shared) for name in (method, here.method)]
            if printed[0] and printed[1]:
                hollow = "published" if printed[0].cells[0].source else "the paper's"
                panel.plot([printed[0].value - printed[1].value], [place], fillstyle="none", **look)
    if hollow:
        empty: dict[str, Any] = look | {"marker": "o", "fillstyle": "none", "color": INK}
        handles += panel.plot([], [], label=f"{hollow}, same datasets", **empty)
    panel.axvline(0, color=INK, linewidth=1)
    for line in range(1, len(here.pairs)):
        panel.axhline(line - 0.5, color=INK, linewidth=0.5, alpha=0.3)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(here.pairs) - 0.5, -0.5)
    panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.set_xlabel(fill(f"difference to {here.method}, points", 44))
    legend(figure, handles, grid="x")
    many_of = max(len(one.by_dataset) for one in here.pairs.values())
    over = f"{many(many_of, 'dataset')}" if many_of > 1 else "seeds"
    caption = f"{here.model}: difference to {here.method} in points of {sweep.measured}, with 95 % confidence "
    caption += f"intervals over {over}; a dot without one has a single value."
    described = "; ".join(f"{method}{text}" for method, text in described_lines.items())
    return Picture(f"differences-{identifier(here.model)}", caption, f"{described}.", figure)


def memory_picture(sweep: Sweep, model: str) -> Picture | None:
    """Draw the peak memory of each method on a GPU; None without any: on a CPU the program takes most of it."""
    runs = sweep.select(model=model)
    runs = runs[(runs["peak_memory_bytes"] > 0) & (runs["device"] != "cpu")]
    means = (runs["peak_memory_bytes"] / 1e9).groupby(runs["method"]).agg(fmean)
    trained = filterfalse(is_zero_shot, sweep.plan.methods)
    memory = {method: float(means[method]) for method in trained if method in means}
    if not memory:
        return None
    figure, names = _rows(list(memory), 1, 0.7)
    panel = figure.subplots()
    colors = [style(sweep, method)["color"] for method in memory]
    bars = panel.barh(names, list(memory.values()), color=colors, height=0.7)
    panel.bar_label(bars, fmt=" %.2f", fontsize=8, color=INK)
    panel.invert_yaxis()
    panel.set_xlabel("peak memory in training, GB")
    panel.set_xlim(0, 1.15 * max(memory.values()))
    panel.xaxis.set_major_locator(MaxNLocator(4))
    legend(figure, [], grid="x")
    caption = f"{model}: peak memory in training on a GPU, mean over the runs of each method."
    described = "; ".join(f"{method} {value:.2f} GB" for method, value in memory.items())
    return Picture(f"memory-{identifier(model)}", caption, f"{described}.", figure)


def parameter_picture(sweep: Sweep, family: str, models: Sequence[str]) -> Picture | None:
    """Draw accuracy against trained parameters of a family, a line for each kind of adapter; None without any.

    At the largest budget that has results, over the datasets that every method of a model has there.
    """
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    panel = figure.subplots()
    handles: dict[str, Any] = {}
    described_lines, named = [], []
    ends, fills = ["-", "--", "-.", ":"], ["full", "none", "left", "bottom"]  # of the first model, the second ...
    for number, model in enumerate(models):
        budgets = [b for b in sweep.trained_budgets(model) if sweep.common(model, b)[0]]
        if not budgets:
            continue
        budget = budgets[-1]
        shared, left_out = sweep.common(model, budget)
        kinds: dict[str, list[tuple[int, str, Estimate]]] = {}
        for method in sweep.methods(model, budget):
            size, average = sweep.parameters(model, method), sweep.average(model, budget, method, shared)
            if size and average:
                # a line has the same adapter at other ranks, but not variants with a name of their own; the part of a
                # label in brackets, such as ``(matched to RandLoRA-6)``, is about the rank
                words = re.sub(r"[\W\d_]+", " ", re.sub(r"\([^)]*\)", " ", method)).split()
                line = " ".join([sweep.kinds[method], *words])
                kinds.setdefault(line, []).append((size, method, average.estimate))
        at = _apart({method: size for points in kinds.values() for size, method, _ in points})
        for points in kinds.values():
            points.sort(key=lambda point: point[0])
            look = style(sweep, points[0][1]) | {"linestyle": ends[number % 4]}
            panel.plot([at[p[1]] for p in points], [p[2].mean for p in points], **(look | {"marker": "", "alpha": 0.6}))
            for size, method, estimate in points:
                mark = style(sweep, method) | {"linewidth": 1.2, "linestyle": "none", "fillstyle": fills[number % 4]}
                half = np.array([estimate.half], dtype=float)
                drawn = panel.errorbar([at[method]], [estimate.mean], half, capsize=2, label=method, **mark)
                handles.setdefault(method, drawn)
                described_lines.append(f"{model} {method}: {size:,} parameters, {estimate.mean:.1f} %")
        left = f"; left out: {', '.join(left_out)}" if left_out else ""
        named.append(f"{model} at {budget} ({many(len(shared), 'dataset')}{left})")
    if not described_lines:
        return None
    if len(named) > 1:
        for number, model in enumerate(models):
            look = {"linestyle": ends[number % 4], "fillstyle": fills[number % 4], "marker": "o", "linewidth": 1.5}
            handles[model] = panel.plot([], [], color=INK, label=model, **look)[0]
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    low, high = (low / 1.6, high * 1.6) if high / low < 3 else (low, high)  # room for more than one tick
    panel.set_xlim(low, high)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set(xlabel="trained parameters", ylabel=f"test {sweep.measured}, %")
    legend(figure, list(handles.values()))
    caption = f"{family}: {sweep.measured} against trained parameters, {', '.join(named)}; bars are 95 % confidence "
    caption += "intervals over seeds (none for one seed). Methods of nearly equal size are drawn side by side, at most "
    caption += "20 % from their place."
    return Picture(f"parameters-{identifier(family)}", caption, f"{'; '.join(described_lines)}.", figure)


def _apart(sizes: dict[str, int]) -> dict[str, float]:
    """Return where to draw sizes on a logarithmic axis: nearly equal ones side by side, within a factor of 1.4."""
    groups: list[list[str]] = []
    for method in sorted(sizes, key=sizes.__getitem__):
        if groups and sizes[method] <= 1.1 * sizes[groups[-1][0]]:
            groups[-1].append(method)
        else:
            groups.append([method])
    return {
        method: sizes[method] if last == 0 else sizes[group[0]] * min(1.15, 1.4 ** (1 / last)) ** (n - last / 2)
        for group, last in ((group, len(group) - 1) for group in groups)
        for n, method in enumerate(group)
    }


def _rows(methods: Sequence[str], marks: int, more: float) -> tuple[Figure, list[str]]:
    """Return a figure of rows that each have a name of some lines, and some marks below each other; and the names."""
    names = [fill(method, 24) for method in methods]
    lines = max(marks, *(name.count("\n") + 1 for name in names))
    height = len(names) * max(0.3, 0.15 * lines + 0.08)
    return Figure(figsize=(WIDTH, height + more), layout="constrained"), names


def legend(figure: Figure, handles: list[Any], grid: Literal["both", "x"] = "both") -> None:
    """Draw the legend below, in as many columns as fit; axes and text in one color."""
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = 5 if longest < 9 else 3 if longest < 15 else 2 if longest < 30 else 1
    if handles:
        look: dict[str, Any] = {"fontsize": 8, "frameon": False, "labelcolor": INK, "ncols": columns}
        figure.legend(handles=handles, loc="outside lower center", **look)
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(handles) // columns))
    figure.set_layout_engine("constrained", rect=(0.01, 0.01, 0.98, 0.98))
    for panel in figure.axes:
        panel.grid(alpha=0.25, color=INK, axis=grid)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, which="both", labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(INK)
        for words in (panel.xaxis.label, panel.yaxis.label):
            words.set(color=INK, fontsize=9)


def curve_pictures(sweep: Sweep, model: str) -> list[Picture]:
    """Draw each reference with the methods that planned pairs join with it, or else with methods of its size."""
    pictures = []
    groups = by_reference(sweep, model)
    for reference in dict.fromkeys(groups.values()):
        methods = {method for method in groups if groups[method] == reference}
        if sweep.plan.pairs:  # a method without such a loss would leave no run that all of them have
            kind = kind_of_loss(sweep, reference)
            alike = {method for method in groups if kind_of_loss(sweep, method) == kind}
            joined = {reference}  # by way of others, too
            while more := {m for pair in sweep.plan.pairs if joined & set(pair) for m in pair} - joined:
                joined |= more
            methods = joined & alike
        others = [m for m in sweep.plan.methods if m in methods and m != reference]
        chosen = "methods that planned pairs join with" if sweep.plan.pairs else "methods of about the size of"
        shown_methods = [reference, *others[:7]]  # more lines cannot be followed
        if others and (picture := curve_picture(sweep, model, shown_methods, f", with {chosen} {reference}")):
            picture.name += f"-{identifier(reference)}"
            left = len(others) - 7
            picture.caption += f" The last {many(left, 'method')} of the sweep are left out." if left > 0 else ""
            pictures.append(picture)
    return pictures


def curve_picture(sweep: Sweep, model: str, methods: Sequence[str], about: str = "") -> Picture | None:
    """Draw validation metric and training loss of some methods against steps; None if no seed has all of them.

    Losses are drawn if they are of one kind. The caption gets a phrase about the methods.
    """
    methods = [method for method in sweep.plan.methods if method in methods]
    alike = len({str(kind_of_loss(sweep, method)) for method in methods}) == 1
    runs = logged_runs(sweep, model)
    runs = runs[runs["method"].isin(methods)]
    runs = runs[runs.groupby(["dataset", "budget", "seed"])["method"].transform("nunique") == len(methods)]
    if runs.empty:
        return None
    steps = set(runs["steps"].fillna(0))
    total = steps.pop() if len(steps) == 1 else 0
    parts = runs["losses"].map(len).min()
    shares = [Fraction(number, parts) for number in range(1, parts + 1)]  # after each part that all runs have
    of_loss = [{float(share): at(curve, share) for share in shares if alike} for curve in runs["losses"]]
    of_score: list[dict[float, float | None]] = []
    for text, last in zip(runs[VALIDATED], runs["steps"], strict=True):
        by_step = scores(text)
        end = max(by_step, default=0) if isna(last) else last
        of_score.append({round(step / end, 3): value for step, value in by_step.items()} if end else {})
    panels: dict[str, DataFrame] = {}
    for title, curves in ((f"validation {sweep.measured}, %", of_score), ("training loss", of_loss)):
        points = DataFrame(curves, index=[runs["method"], runs["dataset"]])
        points = points.dropna(axis="columns").sort_index(axis="columns")  # where all runs of all methods validated
        if len(points.columns) > 1:  # means over the runs of each dataset, and of these over datasets
            panels[title] = points.groupby(["method", "dataset"]).agg(fmean).groupby("method").agg(fmean)
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 2.3 * len(panels) + 0.4), layout="constrained")
    drawn = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    handles: list[Any] = []
    for panel, (title, lines) in zip(drawn, panels.items(), strict=True):
        x = lines.columns * (total or 100)
        handles = [
            panel.plot(x, lines.loc[method], label=method, markersize=3.5, **style(sweep, method))[0]
            for method in methods
        ]
        panel.set_ylabel(title)
        panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(5))
    drawn[-1].set_xlabel("steps" if total else "steps, % of the run")
    legend(figure, handles)
    drawings, count = " and ".join(title.removesuffix(", %") for title in panels), runs["dataset"].nunique()
    caption = f"{model}: {drawings} against steps{about}. Means over {many(count, 'dataset')} "
    caption += "and the runs that all of these methods have"
    caption += "; a loss is the mean of a part of a run." if "training loss" in panels else "."
    described_lines = []
    for method in methods:
        ends = {title: lines.loc[method].iloc[[0, -1]] for title, lines in panels.items()}
        ranges = ", ".join(f"{title} from {first:.3g} to {last:.3g}" for title, (first, last) in ends.items())
        described_lines.append(f"{method} {ranges}")
    return Picture(f"curves-{identifier(model)}", caption, f"{'; '.join(described_lines)}.", figure)
