from itertools import product
from math import comb, pi, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.experiments.report.statistics import Estimate, rank_correlation, sign_test


def test_interval_of_printed_quantiles() -> None:
    """Quantiles of Student's t as any printed table has them."""
    for count, quantile in ((2, 12.706), (3, 4.303), (5, 2.776), (30, 2.045)):
        values = tuple(float(n % 2) for n in range(count))
        mean = sum(values) / count
        error = sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
        half = Estimate(values).half
        assert half is not None and half == pytest.approx(quantile * error, rel=3e-4)


def test_interval_of_three_seeds_covers_95_percent() -> None:
    """With two degrees of freedom the density is known in closed form: its mass within the quantile is 0.95."""
    values = (1.0, 2.0, 4.0)
    estimate = Estimate(values)
    assert estimate.half is not None and estimate.error is not None
    quantile, steps = estimate.half / estimate.error, 200_000
    width = 2 * quantile / steps
    density = [(2 + (-quantile + (n + 0.5) * width) ** 2) ** -1.5 for n in range(steps)]  # t with 2 degrees of freedom
    assert sum(density) * width == pytest.approx(0.95, abs=1e-5)


def test_one_value_has_no_interval() -> None:
    estimate = Estimate((70.0,))
    assert (estimate.mean, estimate.std, estimate.error, estimate.half) == (70.0, None, None, None)


@given(st.integers(0, 8), st.integers(0, 8))
def test_sign_test_by_counting_every_outcome(wins: int, losses: int) -> None:
    total = wins + losses
    if total == 0:
        assert sign_test(wins, losses) is None
        return
    ways = [sum(outcome) for outcome in product((0, 1), repeat=total)] if total <= 10 else None
    if ways is None:
        extreme = sum(comb(total, k) for k in range(total + 1) if comb(total, k) <= comb(total, wins)) / 2**total
    else:
        extreme = sum(abs(k - total / 2) >= abs(wins - total / 2) for k in ways) / len(ways)
    assert sign_test(wins, losses) == pytest.approx(extreme)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=8))
def test_rank_correlation_is_the_correlation_of_ranks(pairs: list[tuple[float, float]]) -> None:
    def ranks(values: list[float]) -> list[float]:
        return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]

    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert rank_correlation(first, second) is None
        return
    a, b = ranks(first), ranks(second)
    mean = (len(pairs) + 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    bottom = sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    assert rank_correlation(first, second) == pytest.approx(top / bottom, abs=1e-9)


def test_two_pairs_are_no_correlation() -> None:
    assert rank_correlation([1, 2], [2, pi]) is None
