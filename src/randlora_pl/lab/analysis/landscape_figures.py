"""Plot of a loss landscape: contours, three models and the lowest paths between them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import product

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from randlora_pl.lab.analysis.figures import colors, footnote, new_figure
from randlora_pl.lab.analysis.landscape import ABOVE, Grid, Point
from randlora_pl.utils.text.formatting import for_figure

Cell = tuple[int, int]


def low_path(heights: Sequence[Sequence[float]], start: Cell, end: Cell) -> list[Cell]:
    """Return the shortest path among those with the lowest maximum height.

    Args:
        heights: (rows, columns); infinity is allowed.
        start: Row and column of the first cell.
        end: Row and column of the last cell.

    Returns:
        Adjacent cells (also diagonally), with start and end.
    """
    cells = {(row, column): height for row, line in enumerate(heights) for column, height in enumerate(line)}
    level = max(cells[cell] for cell in _cheapest(cells, start, end, lambda top, here, there: max(top, cells[there])))
    low = {cell: height for cell, height in cells.items() if height <= level}
    return _cheapest(low, start, end, lambda length, here, there: length + math.dist(here, there))


def _cheapest(
    cells: Mapping[Cell, float], start: Cell, end: Cell, onwards: Callable[[float, Cell, Cell], float]
) -> list[Cell]:
    """Return the path of the least cost, by Dijkstra's algorithm.

    Args:
        cells: Heights of the cells that a path may use.
        start: Its first cell.
        end: Its last cell.
        onwards: Returns the cost of a path from its cost so far, its last cell and the next one.
    """
    before: dict[Cell, Cell] = {}
    reached = [(0.0, start, start)]
    while end not in before:
        cost, here, last = heappop(reached)
        if here in before:
            continue
        before[here] = last
        for there in product(range(here[0] - 1, here[0] + 2), range(here[1] - 1, here[1] + 2)):
            if there in cells and there not in before:
                heappush(reached, (onwards(cost, here, there), there, here))
    path = [end]
    while path[-1] != start:
        path.append(before[path[-1]])
    return path[::-1]


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid in the plane of three models: ``heights`` has one row per y; ``about`` describes the data."""

    labels: tuple[str, str, str]
    corners: tuple[Point, Point, Point]
    losses: tuple[float, float, float]
    grid: Grid
    heights: list[list[float]]
    about: str

    @property
    def top(self) -> float:
        """Loss at which the plots are cut off: 20 % above the highest loss of the three models."""
        return ABOVE * max(self.losses)

    @property
    def clamped(self) -> NDArray[np.float64]:
        """Losses clipped at `top`, (rows along y, columns along x)."""
        return np.minimum(np.array(self.heights, dtype=np.float64), self.top)

    def paths(self) -> dict[tuple[int, int], list[Cell]]:
        """Return the path of the lowest barrier on the grid for each pair of models."""
        return {
            (i, j): low_path(self.heights, self.grid.nearest(self.corners[i]), self.grid.nearest(self.corners[j]))
            for i, j in ((0, 1), (1, 2), (0, 2))
        }

    def barriers(self) -> dict[str, float]:
        """Return the loss barrier of each pair of models: the maximum on the path minus the higher loss, at least 0.

        Grid points need not coincide with the models. At the ends, the models' own losses are used.
        """
        found = {}
        for (i, j), path in self.paths().items():
            ends = max(self.losses[i], self.losses[j])
            corners = self.corners[i], self.corners[j]
            between = [(y, x) for y, x in path if (self.values[x], self.values[y]) not in corners]
            top = max((self.heights[row][column] for row, column in between), default=ends)
            found[f"{self.labels[i]} - {self.labels[j]}"] = max(0.0, top - ends)
        return found

    @property
    def on_grid(self) -> bool:
        """True if all models are grid points; otherwise barriers are rough near them."""
        return all(value in self.values for corner in self.corners for value in corner)

    def points(self, path: Sequence[Cell], i: int, j: int) -> tuple[list[float], list[float]]:
        """Return the x and y coordinates of a path that starts exactly at model i and ends at model j."""
        inner = [(self.values[column], self.values[row]) for row, column in path[1:-1]]
        x, y = zip(self.corners[i], *inner, self.corners[j], strict=True)
        return list(x), list(y)

    @property
    def values(self) -> list[float]:
        """Coordinates of the grid, equal for x and y."""
        return self.grid.values


def contour_figure(landscape: Landscape) -> Figure:
    """Plot the contours of the loss, the three models and the lowest paths between them."""
    figure = new_figure(8, 6.6, f"Loss on the plane through three models\n{landscape.about}")
    axes = figure.subplots()
    heights = landscape.clamped
    lowest = min(float(heights.min()), *landscape.losses)  # a coarse grid may miss the minima
    levels = np.linspace(lowest, max(landscape.top, lowest + 1e-12), 22)
    filled = axes.contourf(landscape.values, landscape.values, heights, levels, cmap="viridis")
    axes.contour(landscape.values, landscape.values, heights, levels[:-1], colors="white", linewidths=0.4, alpha=0.6)
    figure.colorbar(filled, ax=axes, label=f"loss, cut off at {landscape.top:.3g}", format="%.3g")
    for (i, j), path in landscape.paths().items():
        axes.plot(*landscape.points(path, i, j), color="white", linestyle="--", linewidth=1.6)
    axes.plot([], [], color="white", linestyle="--", label="path of the lowest barrier")
    styles = colors(list(landscape.labels))
    for label, corner, loss, marker in zip(landscape.labels, landscape.corners, landscape.losses, "osD", strict=True):
        axes.plot(
            *corner, marker, color=styles[label], markersize=10, markeredgecolor="white", linestyle="none",
            label=for_figure(f"{label}: {loss:.4g}"),
        )  # fmt: skip
    axes.set(aspect="equal", xlabel="x", ylabel="y")
    legend = axes.legend(loc="upper left", fontsize=8, facecolor="#444444")
    for text in legend.get_texts():
        text.set_color("white")
    highest = max(landscape.barriers().values())
    climb = f"at most {highest:.3g} above the higher end" if highest > 0 else "never above the higher end"
    footnote(figure, f"on the grid the paths climb {climb}")
    return figure
