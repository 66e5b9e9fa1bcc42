"""The rule by which a search climbs to its best rates: of scores alone, without a folder or a config."""

from collections.abc import Callable, Sequence

FINALISTS = 2


def climbed(grid: Sequence[float], low: int, high: int, score: Callable[[float], float | None]) -> tuple[int, int]:
    """Extend a part of a grid while its best value is at an end of it.

    Args:
        grid: Values in rising order.
        low: First index of the part.
        high: Last index of the part.
        score: The higher the better, None where it is not known yet; of equal ones the lowest value counts.

    Returns:
        The part to try so far: it only ever grows as scores become known, until its best has a neighbour on both sides
        or is an end of the grid.
    """
    while True:
        scores = [known for value in grid[low : high + 1] if (known := score(value)) is not None]
        if len(scores) <= high - low:
            return low, high
        best = low + scores.index(max(scores))
        if best == low > 0:
            low -= 1
        elif best == high < len(grid) - 1:
            high += 1
        else:
            return low, high
