"""Products of test parameters: a covering part runs by default, the whole of it under the marker `full`."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def covering(*factors: Iterable[Any], strength: int = 2) -> list[Any]:
    """Return the product of the factors as parameters, all but a covering part marked `full`.

    In the part that stays unmarked, any values of any ``strength`` factors meet at least once: 1 is each value once,
    2 is pairwise testing. Rows are picked greedily, so that the same part is picked each time.
    """
    values = [list(factor) for factor in factors]
    rows = list(itertools.product(*(range(len(factor)) for factor in values)))
    meetings = {row: set(itertools.combinations(enumerate(row), strength)) for row in rows}
    missing = set().union(*meetings.values())
    picked = set()
    while missing:
        best = max(rows, key=lambda row: len(meetings[row] & missing))
        picked.add(best)
        missing -= meetings[best]
    order = iter(rows)
    return marked(itertools.product(*values), lambda _: next(order) in picked)


def marked(rows: Iterable[Any], by_default: Callable[[Any], bool]) -> list[Any]:
    """Return rows as parameters, those that do not run by default marked `full`."""
    return [pytest.param(*row, marks=[] if by_default(row) else [pytest.mark.full]) for row in rows]
