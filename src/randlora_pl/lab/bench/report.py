"""Sweeps of the cost of adapted layers, and measured steps as a table, Markdown, JSON and pictures.

A sweep changes one of width, tokens, bases, depth and sparsity; the rest stay.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn

from randlora_pl.lab.bench import METHODS, Spread, adapted, label, ternary
from randlora_pl.lab.bench.steps import Case, Measured, Precision, available
from randlora_pl.utils.files import atomic_file, write_text
from randlora_pl.utils.text import csv_text, markdown_table


@dataclass(frozen=True)
class Point:
    """A stack of square linear layers and its input.

    Attributes:
        width: In and out features of each layer.
        tokens: Rows of the input; 3,200 correspond to 64 images of a ViT-B/32.
        rank: Rank of RandLoRA's bases, of which there are width / rank.
        depth: Layers; RandLoRA's share their bases.
        sparsity: s of ternary bases.
    """

    width: int = 768
    tokens: int = 3200
    rank: int = 6
    depth: int = 1
    sparsity: int | Literal["sqrt"] = 6

    @property
    def bases(self) -> int:
        """Return the number n of bases."""
        return -(-self.width // self.rank)


DEFAULTS: dict[str, list[Any]] = {
    "width": [256, 512, 1024, 2048, 4096],
    "tokens": [200, 800, 3200, 12800],
    "rank": [4, 6, 12, 24, 48, 96],
    "depth": [1, 2, 4, 8],
    "sparsity": [6, 12, 28, 100],
}
"""Values of each sweep."""


@dataclass(frozen=True)
class Reading:
    """Measurements of all methods at one point."""

    sweep: str
    point: Point
    methods: list[Measured]

    @property
    def value(self) -> float:
        """Return the value of what changes."""
        return _number(self.point, self.sweep)

    @property
    def text(self) -> str:
        """Return the value of what changes as in tables."""
        value = getattr(self.point, self.sweep)
        return value if isinstance(value, str) else f"{value:,}"

    def as_rows(self) -> Iterator[dict[str, Any]]:
        """Yield one flat row a method, for CSV and JSON."""
        full = next((one for one in self.methods if one.name == "full"), None)
        for one in self.methods:
            spread, ratio = one.spread(), one.ratio(full)
            row: dict[str, Any] = {"sweep": self.sweep, **asdict(self.point), "bases": self.point.bases}
            row |= {"method": one.name, "label": one.label, "trained": one.trained}
            row |= {f"seconds_{key}": value for key, value in (asdict(spread) if spread else {}).items()}
            row |= {"times_full": ratio.median if ratio else None, "saved_bytes": one.saved, "peak_bytes": one.peak}
            yield row | {"flops": one.flops, "of_peak": one.of_peak(), "problem": one.problem}


def readings(sweeps: dict[str, list[Any]]) -> list[tuple[str, Point]]:
    """Return the points of all sweeps, each in ascending order around the same middle."""
    points = [(name, replace(Point(), **{name: value})) for name in sweeps for value in dict.fromkeys(sweeps[name])]
    return sorted(points, key=lambda each: (list(sweeps).index(each[0]), _number(each[1], each[0])))


def _number(point: Point, sweep: str) -> float:
    value = getattr(point, sweep)
    return math.sqrt(point.width) if value == "sqrt" else value


def methods_at(sweep: str, names: Sequence[str]) -> list[str]:
    """Return the methods that a sweep is about: only RandLoRA has bases whose number or sparsity changes."""
    part = {"rank": "randlora", "sparsity": "ternary"}.get(sweep, "")
    return [name for name in names if name == "full" or part in name]


def cases(
    point: Point, names: Sequence[str], device: torch.device, precision: Precision = "32"
) -> tuple[list[Case], list[Measured]]:
    """Return the methods that can be measured at a point, forward and backward passes; and why the others cannot.

    The input asks for a gradient, as inside of a network.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        base = nn.Sequential(*(nn.Linear(point.width, point.width) for _ in range(point.depth)))
    x = torch.randn(point.tokens, point.width, generator=generator).to(device).requires_grad_()
    upper = torch.randn(point.tokens, point.width, generator=generator).to(device)

    def loss(model: nn.Module) -> Tensor:
        product: Tensor = model(x) * upper
        return product.sum()

    def rank(name: str) -> int:
        return point.rank if "randlora" in name else METHODS[name].rank

    def case(name: str) -> Case:
        sparse = ternary(point.sparsity, name.endswith("dense")) if "ternary" in name else None
        model = adapted(base, name, rank(name), adapt=sparse)
        return Case(
            name, label(name, rank(name)), model, loss, [x, upper],
            device=device, precision=precision, optimize=False, foreign=METHODS[name].foreign,
        )  # fmt: skip

    return available(names, case, lambda name: label(name, rank(name)))


PALETTE = {name: colormaps["tab20" if n < 20 else "tab20b"](n % 20) for n, name in enumerate(METHODS)}
"""Color of each method, the same one in all plots."""


def significant(value: float) -> str:
    """Return a number with three significant digits and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(spread: Spread | None, factor: float = 1.0) -> str:
    if spread is None:
        return ""
    low, median, high = (significant(factor * value) for value in (spread.low, spread.median, spread.high))
    return f"{median} ({low}..{high})"


def _mega(size: int | None) -> str:
    return f"{size / 1e6:,.0f}" if size and size >= 1e7 else f"{size / 1e6:.2f}" if size else ""


def _ratios(one: Measured, results: Sequence[Measured]) -> tuple[Spread | None, Spread | None]:
    """Return the seconds of a method relative to full fine-tuning's and to its counterpart's of PEFT, if measured."""
    others = {other.name: other for other in results if other is not one}
    return one.ratio(others.get("full")), one.ratio(others.get(METHODS[one.name].peer))


def cells(results: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    """Return the table of some results: titles and rows; columns without a value are left out."""
    header = ["method", "trained", "ms a step", "of full", "of PEFT's", "saved MB", "GPU MB", "GFLOP"]
    header += ["% of peak", ""]
    rows = []
    for one in results:
        fraction = one.of_peak()
        rows.append([
            one.label,
            f"{one.trained:,}" if one.trained else "",
            _spread(one.spread(), 1000),
            *map(_spread, _ratios(one, results)),
            _mega(one.saved),
            _mega(one.peak),
            significant(one.flops / 1e9) if one.flops else "",
            "" if fraction is None else f"{100 * fraction:.0f}",
            one.problem,
        ])  # fmt: skip
    used = [column for column, title in enumerate(header) if title == "method" or any(row[column] for row in rows)]
    return [header[column] for column in used], [[row[column] for column in used] for row in rows]


def sweep_cells(readings: Sequence[Reading], sweep: str) -> tuple[list[str], list[list[str]]]:
    """Return the table of one sweep: a row for each value, a column for each method."""
    here = [reading for reading in readings if reading.sweep == sweep]
    names = list(dict.fromkeys(one.name for reading in here for one in reading.methods))
    labels = {one.name: _without_rank(one, reading) for reading in here for one in reading.methods}
    rows = []
    for reading in here:
        by_name = {one.name: one for one in reading.methods}
        values = [reading.text, f"{reading.point.bases:,}"]
        for one in map(by_name.get, names):  # milliseconds, ratio to full fine-tuning and memory
            spread, ratio = (one.spread(), one.ratio(by_name.get("full"))) if one else (None, None)
            if one is None or spread is None:
                values.append(one.problem if one else "")
                continue
            times = f", {ratio.median:.2f}" if ratio and one.name != "full" else ""
            values.append(f"{significant(1000 * spread.median)} ms{times}, {_mega(one.peak or one.saved) or 0} MB")
        rows.append(values)
    return [sweep, "bases", *(labels[name] for name in names)], rows


def _without_rank(one: Measured, reading: Reading) -> str:
    """Return a label for all points of a sweep: where the rank changes, it is left out."""
    return one.label.replace(f"-{reading.point.rank}", "") if reading.sweep == "rank" else one.label


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], command: str) -> str:
    """Return the table for a README, with the machine and the command that made it."""
    return "\n".join([f"{title}, by `{command}`:", "", *markdown_table(header, rows)]) + "\n"


def as_json(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return every value of every round, and the ratios."""
    entries = []
    for one in results:
        ratios = zip(("times_base", "times_peer"), _ratios(one, results), strict=True)
        row = asdict(one) | {key: asdict(ratio) if ratio else None for key, ratio in ratios}
        entries.append(row | {"of_peak": one.of_peak()})
    return entries


def bars(title: str, results: Sequence[Measured]) -> Figure:
    """Return milliseconds per step with their extremes and ratios, next to the memory."""
    shown = [one for one in results if one.seconds]
    figure = Figure(figsize=(11, 1.2 + 0.5 * max(1, len(shown))), layout="constrained")
    figure.suptitle(title, fontsize=10)
    times, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    positions = range(len(shown))
    colours = [PALETTE[one.name] for one in shown]
    medians, errors = _milliseconds(shown)
    times.barh(positions, medians, xerr=errors, color=colours, capsize=3)
    times.set_yticks(positions, [one.label for one in shown])
    times.invert_yaxis()
    times.set_xlabel("milliseconds per step, median and extremes, with the ratio of full")
    for position, one in enumerate(shown):
        if ratio := _ratios(one, shown)[0]:
            times.annotate(f" {ratio.median:.2f}", (1000 * max(one.seconds), position), va="center", fontsize=9)
    times.margins(x=0.12)
    on_gpu = any(one.peak for one in shown)
    memory.barh(positions, [(one.peak or 0 if on_gpu else one.saved) / 1e6 for one in shown], color=colours)
    memory.set_xlabel("MB allocated at the peak" if on_gpu else "MB kept for the backward pass")
    return figure


def _milliseconds(results: Sequence[Measured]) -> tuple[list[float], list[list[float]]]:
    """Return the medians of some steps, and how far their extremes lie below and above."""
    spreads = [Spread.over([1000 * value for value in one.seconds]) for one in results]
    errors = [[spread.median - spread.low for spread in spreads], [spread.high - spread.median for spread in spreads]]
    return [spread.median for spread in spreads], errors


def curves(title: str, readings: Sequence[Reading]) -> Figure:
    """Return a column of panels for each sweep: milliseconds above, memory below, logarithmic.

    Heights are logarithmic where they span more than a factor of ten, and begin at zero otherwise.
    """
    sweeps = list(dict.fromkeys(reading.sweep for reading in readings))
    figure = Figure(figsize=(1.5 + 4 * max(1, len(sweeps)), 7.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(2, max(1, len(sweeps)), squeeze=False)
    names = list(dict.fromkeys(one.name for reading in readings for one in reading.methods))
    for column, sweep in enumerate(sweeps):
        here = [reading for reading in readings if reading.sweep == sweep]
        for name in names:
            line = [(r, one) for r in here for one in r.methods if one.name == name and one.seconds]
            if not line:
                continue
            x = [reading.point.bases if sweep == "rank" else reading.value for reading, _ in line]
            medians, errors = _milliseconds([one for _, one in line])
            style: dict[str, Any] = {"color": PALETTE[name], "marker": "o", "markersize": 4}
            style["label"] = _without_rank(line[0][1], line[0][0])
            panels[0, column].errorbar(x, medians, errors, capsize=2, **style)
            panels[1, column].plot(x, [(one.peak or one.saved) / 1e6 for _, one in line], **style)
        at = sorted((r.point.bases, f"{r.point.bases:,}") if sweep == "rank" else (r.value, r.text) for r in here)
        for panel in panels[:, column]:
            panel.set(xscale="log", xlabel="number of bases" if sweep == "rank" else sweep)
            panel.set_xticks([value for value, _ in at], [text for _, text in at])
            panel.set_xticks([], minor=True)
            heights = [value for line in panel.get_lines() for value in line.get_ydata() if value > 0]
            if heights and max(heights) > 10 * min(heights):
                panel.set_yscale("log")
                panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            else:
                panel.set_ylim(0, 1.1 * max(heights, default=1))
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("milliseconds, forward and backward")
    on_gpu = any(one.peak for reading in readings for one in reading.methods)
    panels[1, 0].set_ylabel("MB allocated at the peak" if on_gpu else "MB kept for the backward pass")
    if readings:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Draw a PNG file."""
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def write_json(content: Any, path: Path) -> None:
    """Write JSON for readers of any language; what could not be measured is null."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows of equal keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    write_text(path, csv_text([keys, *([row.get(key) for key in keys] for row in rows)]))
