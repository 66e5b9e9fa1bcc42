"""Pictures of a landscape that is known."""

import math
from pathlib import Path

import pytest

from randlora_pl.lab.analysis.figures import write_figure
from randlora_pl.lab.analysis.landscape import POSITIONS, Grid, Landscape, contour_figure

GRID = Grid(13, 0.1)


def bowl(x: float, y: float) -> float:
    """A valley along x with a wall to the third model that is lowest far to the right; infinite in one corner."""
    wall = math.exp(-30 * (y - 0.5) ** 2) * (0.3 + 2 * (x - 1.1) ** 2)
    return math.inf if x < 0 and y > 1 else 0.2 + wall + 0.01 * x


def landscape() -> Landscape:
    corners = POSITIONS["paper"]
    losses = tuple(bowl(*corner) for corner in corners)
    heights = [[bowl(x, y) for x in GRID.values] for y in GRID.values]
    return Landscape(("LoRA", "RandLoRA", "FullFineTuning"), corners, losses, GRID, heights, "5 of 100 images")  # type: ignore[arg-type]


def test_heights_are_cut_off_above_the_shallowest_minimum() -> None:
    made = landscape()
    assert made.top == pytest.approx(1.2 * max(made.losses))


def test_paths_end_at_the_models_and_cross_where_the_wall_is_low() -> None:
    made = landscape()
    paths = made.paths()
    for (i, j), path in paths.items():
        assert (path[0], path[-1]) == (GRID.nearest(made.corners[i]), GRID.nearest(made.corners[j]))
    values = GRID.values
    crossing = [values[column] for row, column in paths[0, 2] if abs(values[row] - 0.5) < 0.06]
    assert crossing and min(crossing) > 0.85
    found = made.barriers()
    assert found["LoRA - RandLoRA"] < 0.01 and 0.25 < found["LoRA - FullFineTuning"] < 0.4
    assert found.keys() == {"LoRA - RandLoRA", "RandLoRA - FullFineTuning", "LoRA - FullFineTuning"}


def test_contours_show_models_paths_and_the_cut(tmp_path: Path) -> None:
    figure = contour_figure(landscape())
    axes = figure.axes[0]
    markers = [line for line in axes.get_lines() if line.get_marker() not in ("None", "", None)]
    assert [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in markers] == list(POSITIONS["paper"])  # type: ignore[index]
    assert sum(line.get_linestyle() == "--" and len(line.get_xdata()) > 1 for line in axes.get_lines()) == 3  # type: ignore[arg-type]
    legend = axes.get_legend()
    assert legend is not None and "FullFineTuning: 0.2" in legend.get_texts()[-1].get_text()
    write_figure(figure, tmp_path, "picture")
    once = (tmp_path / "picture.svg").read_bytes()
    assert (tmp_path / "picture.png").stat().st_size > 10_000 and once.startswith(b"<?xml")
    write_figure(contour_figure(landscape()), tmp_path, "picture")
    assert (tmp_path / "picture.svg").read_bytes() == once


def test_a_flat_landscape_is_drawn() -> None:
    heights = [[0.5] * 3 for _ in range(3)]
    flat = Landscape(("a", "b", "c"), POSITIONS["paper"], (0.5, 0.5, 0.5), Grid(3, 0), heights, "")
    assert contour_figure(flat).axes and set(flat.barriers().values()) == {0.0}


@pytest.mark.parametrize("height", [9.0, math.inf, 0.0])
def test_a_grid_that_misses_every_minimum_is_drawn(height: float) -> None:
    losses = (1.0, 1.0, 2.0) if height else (0.0, 0.0, 0.0)
    heights = [[height] * 4 for _ in range(4)]
    made = Landscape(("a", "b", "c"), POSITIONS["paper"], losses, Grid(4, 0.7), heights, "")
    legend = contour_figure(made).axes[0].get_legend()
    assert legend is not None and f"c: {losses[2]:.4g}" in [text.get_text() for text in legend.get_texts()]


def test_barriers_are_above_the_models_own_losses() -> None:
    heights = [[5.0, 4.0, 5.0], [5.0, 3.0, 5.0], [5.0, 2.0, 5.0]]
    corners = POSITIONS["paper"]  # none of them is a point of the grid -1, 0.5, 2
    off = Landscape(("a", "b", "c"), corners, (1.0, 1.5, 2.0), Grid(3, 1.0), heights, "")
    assert off.barriers() == {"a - b": 1.5, "b - c": 1.0, "a - c": 1.0} and not off.on_grid
    on = Landscape(("a", "b", "c"), corners, (5.0, 5.0, 2.0), Grid(3, 0.0), heights, "")
    assert on.barriers() == {"a - b": 0.0, "b - c": 0.0, "a - c": 0.0} and on.on_grid
