"""Minimax paths on a height map: the highest cell on the path is as low as possible."""

import heapq
import math
from collections.abc import Callable, Sequence

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
    climb = _search(heights, start, end, lambda cost, here, there: max(cost, _at(heights, there)))
    level = max(_at(heights, cell) for cell in climb)

    def length(cost: float, here: Cell, there: Cell) -> float:
        return cost + math.dist(here, there) if _at(heights, there) <= level else math.inf

    return _search(heights, start, end, length)


def _at(heights: Sequence[Sequence[float]], cell: Cell) -> float:
    return heights[cell[0]][cell[1]]


def _search(
    heights: Sequence[Sequence[float]], start: Cell, end: Cell, step: Callable[[float, Cell, Cell], float]
) -> list[Cell]:
    """Run Dijkstra's algorithm (1959) for costs that never decrease along a path."""
    rows, columns = len(heights), len(heights[0])
    best: dict[Cell, float] = {start: step(0.0, start, start) if start != end else 0.0}
    came: dict[Cell, Cell] = {}
    queue = [(best[start], start)]
    done: set[Cell] = set()
    while queue:
        cost, here = heapq.heappop(queue)
        if here == end:
            break
        if here in done:
            continue
        done.add(here)
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                there = here[0] + down, here[1] + right
                if not (0 <= there[0] < rows and 0 <= there[1] < columns) or there in done:
                    continue
                new = step(cost, here, there)
                if there not in best or new < best[there]:
                    best[there], came[there] = new, here
                    heapq.heappush(queue, (new, there))
    path = [end]
    while path[-1] != start:
        path.append(came[path[-1]])
    return path[::-1]
