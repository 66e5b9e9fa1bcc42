"""Low paths against all paths of small maps."""

import math
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from randlora_pl.lab.analysis.landscape import Cell, low_path

HEIGHTS = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, math.inf]), min_size=3, max_size=3), min_size=3, max_size=3
)


def all_paths(start: Cell, end: Cell) -> list[list[Cell]]:
    """Every path without a repeated cell on a 3 x 3 map."""
    found, open_ = [], [[start]]
    while open_:
        path = open_.pop()
        if path[-1] == end:
            found.append(path)
            continue
        for cell in product(range(3), range(3)):
            if cell not in path and max(abs(cell[0] - path[-1][0]), abs(cell[1] - path[-1][1])) == 1:
                open_.append([*path, cell])
    return found


PATHS = {end: all_paths((0, 0), end) for end in ((0, 0), (0, 2), (2, 2), (1, 1))}


def top(heights: list[list[float]], path: list[Cell]) -> float:
    return max(heights[row][column] for row, column in path)


def length(path: list[Cell]) -> float:
    return sum(math.dist(a, b) for a, b in pairwise(path))


@settings(max_examples=60)
@given(HEIGHTS, st.sampled_from(sorted(PATHS)))
def test_no_path_climbs_less_and_none_that_climbs_as_little_is_shorter(heights: list[list[float]], end: Cell) -> None:
    path = low_path(heights, (0, 0), end)
    assert path in PATHS[end]
    lowest = min(top(heights, each) for each in PATHS[end])
    assert top(heights, path) == lowest
    shortest = min(length(each) for each in PATHS[end] if top(heights, each) == lowest)
    assert length(path) == pytest.approx(shortest)


def test_a_path_goes_round_a_hill() -> None:
    heights = [[0.0, 9.0, 1.0], [0.0, 9.0, 0.0], [0.0, 0.5, 0.0]]
    assert low_path(heights, (0, 0), (0, 2)) == [(0, 0), (1, 0), (2, 1), (1, 2), (0, 2)]
