"""What a comparison does in a given time: plans, their seconds, and what fits if nothing does."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.sweep.timing import (
    SPARE,
    TIERS,
    Budget,
    Cost,
    Sizes,
    Tier,
    seconds_of,
    spent,
    tiers,
    time_of,
)
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

SIZES = Sizes(steps=100, batch=128, train=6400, val=100, test=250, classes=5)


@in_one_item(
    ("text", "seconds"),
    [
        *(("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("1h1m1s", 3661)),
        *((text, None) for text in ("", "0s", "30", "-5m", "5 m", "30min", "m", "1m1h", "nan", "1e3s")),
    ],
)
def test_a_time_is_read(text: str, seconds: float | None) -> None:
    if seconds is not None:
        assert seconds_of(text) == seconds
        return
    with pytest.raises(UserError, match="expected a time such as 90s, 30m, 2h or 1h30m"):
        seconds_of(text)


@given(seconds=st.floats(1, 1e6))
def test_a_shown_time_is_read_again_and_never_shorter(seconds: float) -> None:
    again = seconds_of(time_of(seconds))
    assert seconds <= again <= max(1.2 * seconds, seconds + 10)


def test_the_time_of_a_run_follows_from_a_short_one() -> None:
    """It starts in 2 s, takes two seconds for a step, and validates in 18 - 6 x 2 = 6 s."""
    results = {"cell_seconds": 20.0, "fit_seconds": 18.0, "images_per_second": 64.0}
    assert Cost.of(results, SIZES) == (2 + 200 + 6, 2 + 200 + 6 + 3 * 6 + 6 * 2.5, 2.0)
    assert Cost.of({"fit_seconds": 12.0, "images_per_second": None}, SIZES) == (200, 200, 2.0)
    assert spent([results, {"fit_seconds": 3}]) == 23


def test_a_plan_costs_trials_further_seeds_of_the_finalists_and_tested_runs() -> None:
    one = [Cost(10, 20)]
    assert Tier(9, 3, 5).seconds(one) == 9 * 10 + 4 * 2 * 10 + 5 * 20
    assert Tier(3, 2, 1).seconds(one) == 3 * 10 + 3 * 10 + 20
    assert Tier(0, 1, 1).seconds(one) == 20


def test_plans_get_smaller_and_five_seeds_come_before_trials() -> None:
    for larger, smaller in pairwise(TIERS):
        assert larger.seconds([Cost(1, 1)]) > smaller.seconds([Cost(1, 1)])
    assert [tier.trials for tier in TIERS if tier.seeds == 5][-1] == 5
    assert tiers(Tier(8, 3, 2))[:2] == [(8, 3, 2), (8, 2, 2)] and tiers(Tier(8, 3, 2))[-1] == TIERS[-1]


def budget(seconds: float, **costs: tuple[float, float]) -> Budget:
    return Budget(seconds, 30, {name: Cost(*cost) for name, cost in costs.items()}, steps=100)


def two(seconds: float) -> Budget:
    return budget(seconds, probe=(10, 20), full=(30, 40))


@in_one_item(
    ("left", "tier"),
    [
        *((60 / SPARE + 1, (0, 1, 1)), (60.0, (0, 1, 1)), (59.0, None), (181 / SPARE, (3, 1, 1))),
        *((501 / SPARE, (5, 1, 5)), (499 / SPARE, (5, 1, 3)), (1e9, (16, 3, 5))),
    ],
)
def test_the_largest_plan_that_fits_is_taken(left: float, tier: tuple[int, ...] | None) -> None:
    if tier is not None:
        assert two(30 + left).fitting(TIERS[0]) == tier
        return
    with pytest.raises(UserError, match="one run of each of the 2 methods takes about 60 s"):
        two(30 + left).fitting(TIERS[0])


@given(seconds=st.floats(1, 1e5), costs=st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.1, 50)), min_size=1))
def test_more_time_never_gives_a_smaller_plan(seconds: float, costs: list[tuple[float, float]]) -> None:
    places = []
    for time in (seconds, 2 * seconds):
        given = budget(time, **{f"m{place}": pair for place, pair in enumerate(costs)})
        try:
            tier = given.fitting(TIERS[0])
        except UserError:
            places.append(len(TIERS))
        else:
            assert given.expected(tier) <= time
            places.append(TIERS.index(tier))
    assert places[1] <= places[0]


def test_seeds_follow_from_the_seconds_of_the_search() -> None:
    assert [two(0).seeds(left, {}, 5) for left in (-10.0, 60.0, 64.0, 200.0, 1e9)] == [1, 1, 1, 3, 5]
    slower = {"probe": [15.0, 16.0, 90.0], "full": []}
    assert [two(0).seeds(left, slower, 5) for left in (138.0, 140.0)] == [1, 2], "a tested run of the probe takes 26 s"


def test_a_budget_that_is_too_small_is_answered_with_what_fits() -> None:
    steps = {"linear probe": 0.1, "LoRA": 0.5, "full": 1.0}
    costs = {method: Cost(2 + 100 * step, 6 + 100 * step, step) for method, step in steps.items()}
    with pytest.raises(UserError) as refused:
        Budget(110, 30, costs, steps=100).fitting(TIERS[0])
    assert "takes about 3 min (linear probe 16 s, LoRA 56 s, full 2 min)" in refused.value.what
    assert refused.value.hint == "What fits: --budget 3m30s, or --data.steps 30, or --methods 'linear probe' LoRA"
    with pytest.raises(UserError) as refused:
        Budget(50, 30, costs, steps=100).fitting(TIERS[0])
    assert refused.value.hint == "What fits: --budget 3m30s"
