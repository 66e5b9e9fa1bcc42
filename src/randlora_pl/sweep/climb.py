"""The rules by which a search climbs to its best rates: of scores alone, without a folder or a config.

The higher a score, the better. It is None if it is not known yet, and minus infinity if a candidate failed. Of
equal ones the lowest rates count.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from statistics import fmean, stdev
from typing import Any, TypeVar

from randlora_pl.sweep import BEST, LOWEST

FINALISTS = {LOWEST: 4, BEST: 2}
"""Candidates of a method that run with all seeds."""
TRIALS, MOST, MORE = {1: 8, 2: 16}, {1: 16, 2: 28}, 4
"""Trials of every method at first and at most, by the largest number of rates of a method, and the steps between."""
Point = tuple[int, ...]
"""Index of each rate in its grid, the adapter's first."""
Values = tuple[Any, ...]
"""A candidate: a value of each option, the rates first."""
Score = Callable[[Values], float | None]
Item = TypeVar("Item")


def climbed(
    grid: Sequence[Item], low: int, high: int, score: Callable[[Item], float | None]
) -> tuple[Sequence[Item], Item | None]:
    """Extend a part of a grid while its best item is at an end of it.

    Args:
        grid: Items in the order of rising rates.
        low: First index of the part, if the grid has it.
        high: Last index of the part, if the grid has it.
        score: Score of an item.

    Returns:
        The part to try so far, and the best of it, None while a score is open. The part only ever grows as scores
        become known, until its best has a neighbour on both sides or is an end of the grid.
    """
    low, high = max(low, 0), min(high, len(grid) - 1)
    while True:
        part = grid[low : high + 1]
        scores = [known for item in part if (known := score(item)) is not None]
        if len(scores) < len(part):
            return part, None
        best = low + scores.index(max(scores))
        if best == low > 0:
            low -= 1
        elif best == high < len(grid) - 1:
            high += 1
        else:
            return part, grid[best]


@dataclass
class Climb:
    """A climb to the best rates of a method: by the adapter's, then by the head's, alternately.

    Attributes:
        grids: Values of each rate in rising order.
        rest: Values of the other options.
        start: Point to begin at.
        first: Score with the first seed.
        every: Mean score with all seeds.
        order: Points to try with the first seed, in the order in which they are asked for.
        finalists: Points to try with all seeds.
        over: True if no score of these is open.
        best: Best finalist; None before one has worked.
    """

    grids: Sequence[Sequence[float]]
    rest: Values
    start: Point
    first: Score
    every: Score
    order: list[Point] = field(default_factory=list)
    finalists: list[Point] = field(default_factory=list)
    over: bool = False
    best: Point | None = None

    def __post_init__(self) -> None:
        self.first, self.every = cache(self.first), cache(self.every)

    def values(self, point: Point) -> Values:
        """Return the candidate at a point."""
        return (*(grid[index] for grid, index in zip(self.grids, point, strict=True)), *self.rest)

    def worked(self, points: Iterable[Point], score: Score) -> list[Point]:
        """Return the points with a score, without those that failed, the best first."""
        scores = {point: known for point in points if (known := score(self.values(point))) not in (None, -math.inf)}
        return sorted(scores, key=lambda point: (-scores[point], point))

    def advance(self, trials: int) -> None:
        """Ask for points until there are so many, then for finalists, as far as scores are known.

        First the best point gets a neighbour on both sides in each rate. Every trial that is left goes to the nearest
        point, of equally near ones to the one with the highest rates: it measures how far from failing the best is.
        """
        while len(self.order) < trials and (top := self._settle()) is not None:
            center = self.best or top
            left = [point for point in self._all() if point not in self.order]
            if not left:
                break
            self.order.append(min(left, key=lambda point: (_steps(point, center), [-index for index in point])))
        del self.order[trials:]
        self.over = self._known(self.order, self.first)
        if self.over:
            worked = self.worked(self.order, self.first)
            asked = sorted(
                worked, key=lambda point: point > worked[0] or _steps(point, worked[0]) > 1
            )  # lower ones next to it
            self.finalists = list(dict.fromkeys([*self.finalists, *asked[: FINALISTS[LOWEST]]]))
            self.over = self._known(self.finalists, self.every)
            self.best = next(iter(self.worked(self.finalists, self.every)), None)

    def untried(self) -> set[Point]:
        """Return the neighbours of the best point in each rate that were not tried, also outside of the grids."""
        point = self.best or ()
        axes = [axis for axis in range(len(point)) if len(self.grids[axis]) > 1]
        beside = {(*point[:axis], point[axis] + step, *point[axis + 1 :]) for axis in axes for step in (-1, 1)}
        return beside - {*self.order}

    def interior(self) -> bool:
        """Return True if the best point has been tried with a lower and a higher value of each rate."""
        return self.best is not None and not self.untried()

    def lacking(self) -> bool:
        """Return True if a rate next to the best one has not been tried."""
        return not self.untried().isdisjoint(self._all())

    def _known(self, points: Iterable[Point], score: Score) -> bool:
        return all(score(self.values(point)) is not None for point in points)

    def _all(self) -> Iterable[Point]:
        return product(*(range(len(grid)) for grid in self.grids))

    def _settle(self) -> Point | None:
        """Climb by each rate until a point is the best by all of them; return it, None while a score is open."""
        point, axis, still = next(iter(self.worked(self.order, self.first)), self.start), 0, 0
        while still < len(self.grids):
            line: list[Point] = [(*point[:axis], index, *point[axis + 1 :]) for index in range(len(self.grids[axis]))]
            best = climbed(line, point[axis] - 1, point[axis] + 1, self._ask)[1]
            if best is None:
                return None
            still = still + 1 if best == point else 1
            point, axis = best, (axis + 1) % len(self.grids)
        return point if self._known(self.order, self.first) else None

    def _ask(self, point: Point) -> float | None:
        if point not in self.order:
            self.order.append(point)
        return self.first(self.values(point))


def advance_together(climbs: Sequence[Climb], trials: int | None) -> int:
    """Advance climbs as far as scores are known, and return the number of trials of each.

    Without a number of trials, all get more while the best point of one lacks a neighbour.
    """
    rates = 2 if any(len(climb.grids) > 1 for climb in climbs) else 1
    count, most = trials or TRIALS[rates], trials or MOST[rates]
    while True:
        for climb in climbs:
            climb.advance(count)
        if count >= most or not all(climb.over for climb in climbs) or not any(climb.lacking() for climb in climbs):
            return count
        count += MORE


def lowest(scores: Mapping[Point, Sequence[float]]) -> Point:
    """Return the point with the lowest rates among those within one standard error of the best.

    The standard error belongs to the differences to the best, paired by run. No rate of the choice is higher than the
    best's. A single run has no standard error, so that the best is chosen.

    Args:
        scores: By point: the score of each run, of the same runs for all points.
    """
    best = min(scores, key=lambda point: (-fmean(scores[point]), point))
    near = [best]
    for point, figures in scores.items():
        lost = [top - figure for top, figure in zip(scores[best], figures, strict=True)]
        below = all(index <= highest for index, highest in zip(point, best, strict=True))
        if below and len(lost) > 1 and fmean(lost) <= stdev(lost) / math.sqrt(len(lost)):
            near.append(point)
    return min(near, key=lambda point: (sum(point), point))


def _steps(point: Point, other: Point) -> int:
    return sum(abs(index - its) for index, its in zip(point, other, strict=True))
