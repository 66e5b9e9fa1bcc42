"""Helpers for the plots of all analyses: colors by method, and writing PNG and SVG."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from randlora_pl.utils.files import atomic_file
from randlora_pl.utils.text import for_figure

_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#d62728", "#8c564b", "#e377c2", "#17becf")
FULL = "#555555"
"""Color of full fine-tuning in every plot."""


def colors(labels: list[str]) -> dict[str, str]:
    """Return a color per label; full fine-tuning is always gray."""
    free = iter(_COLORS * (1 + len(labels) // len(_COLORS)))
    return {label: FULL if label.startswith("FullFineTuning") else next(free) for label in labels}


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return a figure with a title; the size is in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(for_figure(title), fontsize=11)
    return figure


def footnote(figure: Figure, text: str) -> None:
    """Add a remark below the panels."""
    figure.supxlabel(for_figure(text), fontsize=8, color="#555555")


def legend(figure: Figure, axes: Any, columns: int = 4) -> None:
    """Add one legend for all panels, above them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=9)


def write_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write ``NAME.png`` and ``NAME.svg``, without a date, so that equal plots give equal files."""
    with atomic_file(folder / f"{name}.png") as stream:
        figure.savefig(stream, format="png", dpi=130)
    with rc_context({"svg.hashsalt": name}), atomic_file(folder / f"{name}.svg") as stream:
        figure.savefig(stream, format="svg", metadata={"Date": None})
