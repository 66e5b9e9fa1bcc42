"""The climb of two rates by made-up scores, and the choice of the lowest ones."""

import math
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.sweep.climb import FINALISTS, LOWEST, Climb, Point, advance_together, lowest
from tests.support.products import in_one_item

OCTAVES = [float(power) for power in range(-10, 11)]
"""A grid whose values are the exponents."""


def ridge(top: Sequence[float], cliff: Sequence[float] = ()) -> Callable[..., float]:
    """A score that falls by the squared distance to a top, and by much more from a cliff on."""

    def score(values: Sequence[float]) -> float:
        if any(value >= end for value, end in zip(values, cliff, strict=False)):
            return -math.inf
        return -sum((value - at) ** 2 for value, at in zip(values, top, strict=True))

    return score


def climb_of(score: Callable[..., float | None], rates: int = 2, grid: Sequence[float] = OCTAVES) -> Climb:
    return Climb([grid] * rates, (), (len(grid) // 2,) * rates, score, score)


def search(climbs: Callable[[], Sequence[Climb]], trials: int | None = None) -> Sequence[Climb]:
    """Climbs whose scores are all known."""
    found = climbs()
    advance_together(found, trials)
    return found


@given(data=st.data(), trials=st.sampled_from([None, 5, 16]))
def test_scores_in_any_order_give_the_same_points_which_only_grow(data: st.DataObject, trials: int | None) -> None:
    heights = data.draw(st.lists(st.sampled_from([-math.inf, 0.1, 0.2, 0.3, 0.4]), min_size=25, max_size=25))
    grid = [0.0, 1.0, 2.0, 3.0, 4.0]
    truth = {(a, b): heights[int(5 * a + b)] for a in grid for b in grid}
    (whole,) = search(lambda: [climb_of(truth.get, grid=grid)], trials)
    known: dict[tuple[float, ...], float] = {}
    before: set[Point] = set()
    while True:  # a new process each time, to which any of the open scores becomes known
        climb = climb_of(known.get, grid=grid)
        count = advance_together([climb], trials)
        asked = [*climb.order, *climb.finalists]
        assert before <= set(asked) and len(climb.order) <= count
        before = set(asked)
        open_ones = [values for values in map(climb.values, asked) if values not in known]
        if not open_ones:
            break
        values = data.draw(st.sampled_from(open_ones))
        known[values] = truth[values]  # type: ignore[index]
    assert (climb.order, climb.best, climb.over) == (whole.order, whole.best, True)
    assert len(whole.order) == (trials or count) or len(whole.order) == 25


@given(top=st.tuples(*[st.integers(-5, 5)] * 2), above=st.integers(1, 4))
def test_every_climb_ends_inside_and_has_as_many_trials_as_the_others(top: tuple[int, int], above: int) -> None:
    cliff = (top[0] + above, 11)

    def climbs() -> Sequence[Climb]:
        return [climb_of(ridge(top, cliff)), climb_of(ridge((0, 0))), climb_of(ridge((3,)), rates=1)]

    found = search(climbs)
    far, near, alone = found
    assert {len(climb.order) for climb in found} == {len(near.order)} and 16 <= len(near.order) <= 28
    assert all(climb.over and climb.interior() for climb in found) or len(near.order) == 28
    if far.interior():
        assert far.best is not None and far.values(far.best) == tuple(map(float, top))
        lower = [tuple(index - (axis == at) for axis, index in enumerate(far.best)) for at in (0, 1)]
        assert set(lower) <= set(far.finalists), "both rates one step lower run with all seeds"
    assert alone.best == (13,) and len(far.finalists) >= FINALISTS[LOWEST]


def test_what_is_left_measures_how_far_from_failing_the_best_is() -> None:
    (climb,) = search(lambda: [climb_of(ridge((0, 0), (2, 11)))], 12)
    cross = {(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)}
    assert {climb.values(point) for point in climb.order[:5]} == cross
    assert [climb.values(point) for point in climb.order[5:8]] == [(2, 0), (1, 1), (1, -1)], "the nearest, higher first"
    (climb,) = search(lambda: [climb_of(lambda values: 0.5, rates=1, grid=[1.0, 2.0, 3.0])])
    assert climb.best == (0,), "of equals the lowest"
    assert not climb.interior() and not climb.lacking(), "nothing is below the end of the grid"


def test_both_rates_one_step_lower_are_finalists_even_if_many_others_are_better() -> None:
    steep = lambda values: -sum(5 * abs(value) if value < 0 else value / 10 for value in values)  # noqa: E731
    (climb,) = search(lambda: [climb_of(steep)])
    assert {climb.values(point) for point in climb.finalists} == {(0, 0), (-1, 0), (0, -1), (0, 1)}


def test_the_rates_take_turns_until_neither_is_better() -> None:
    slope = lambda values: -((values[0] - values[1]) ** 2) - (values[0] - 6) ** 2 / 2  # noqa: E731
    (climb,) = search(lambda: [climb_of(slope)], 14)
    adapter, head = [(-1, 0), (0, 0), (1, 0), (2, 0), (3, 0)], [(2, -1), (2, 1), (2, 2), (2, 3)]
    assert [climb.values(point) for point in climb.order[:11]] == [*adapter, *head, (1, 2), (3, 2)]
    assert climb.best is not None and climb.values(climb.best) == (3, 3), "one of the trials that were left is better"


def test_another_best_with_all_seeds_gets_its_neighbours() -> None:
    def climb() -> Climb:
        plain = ridge((0, 0))
        first = lambda values: -0.1 if values == (0, 2) else plain(values)  # noqa: E731
        return Climb([OCTAVES] * 2, (), (10, 10), first, lambda values: 1.0 if values == (0, 2) else plain(values))

    typed, raised = climb(), climb()
    assert advance_together([typed], 16) == 16, "a typed number is not raised"
    assert typed.best == (10, 12) and typed.lacking() and not typed.interior()
    assert advance_together([raised], None) == 20
    assert raised.best == (10, 12) and raised.interior() and raised.order[:16] == typed.order


def test_a_method_that_fails_everywhere_does_not_cost_the_others_trials() -> None:
    found = search(lambda: [climb_of(lambda values: -math.inf), climb_of(ridge((0, 0)))])
    assert [len(climb.order) for climb in found] == [16, 16]
    assert found[0].best is None and found[0].over and not found[0].finalists


@in_one_item(
    ("scores", "chosen"),
    [
        ({(1, 1): [0.9, 0.8, 0.7]}, (1, 1)),
        ({(1, 1): [0.9, 0.8, 0.7], (0, 1): [0.8, 0.7, 0.6]}, (1, 1)),  # always lower, by the same: nothing is noise
        ({(1, 1): [0.9, 0.8, 0.7], (0, 1): [0.9, 0.8, 0.7]}, (0, 1)),
        ({(1, 1): [0.9, 0.8, 0.7], (0, 1): [0.8, 0.85, 0.7]}, (0, 1)),
        ({(1, 1): [0.9, 0.8, 0.7], (0, 1): [0.8, 0.8, 0.68]}, (1, 1)),  # 4 points lower, and the error is 3.1
        ({(1, 1): [0.9, 0.8, 0.7], (0, 1): [0.8, 0.85, 0.7], (0, 0): [0.7, 0.7, 0.9]}, (0, 0)),
        ({(1, 1): [0.9, 0.8, 0.7], (0, 2): [0.8, 0.85, 0.7], (2, 0): [0.9, 0.8, 0.7]}, (1, 1)),  # higher in one rate
        ({(3, 1): [0.9, 0.8], (2, 1): [0.8, 0.85], (3, 0): [0.8, 0.85]}, (2, 1)),  # of equals the lower adapter's
        ({(1, 1): [0.9], (0, 1): [0.8999]}, (1, 1)),  # one run has no standard error
    ],
)
def test_the_lowest_rates_within_one_standard_error_are_chosen(scores: dict[Point, list[float]], chosen: Point) -> None:
    assert lowest(scores) == chosen
