from itertools import product
from math import pi, sqrt
from statistics import fmean

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st

from randlora_pl.lab.report import Crossed, Estimate, holm, partial_rank_correlation, rank_correlation, sign_flip_test


def test_interval_of_printed_quantiles() -> None:
    """Quantiles of Student's t as any printed table has them."""
    for count, quantile in ((2, 12.706), (3, 4.303), (5, 2.776), (30, 2.045)):
        values = tuple(float(n % 2) for n in range(count))
        mean = sum(values) / count
        error = sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
        half = Estimate(values).half
        assert half is not None and half == pytest.approx(quantile * error, rel=3e-4)
    alone = Estimate((70.0,))
    assert (alone.mean, alone.std, alone.error, alone.half) == (70.0, None, None, None)


@example([1.25, 1.31, 1.94, 0.19, -1.5, -3.19])  # its mean is zero but for rounding
@given(st.lists(st.floats(-5, 5).map(lambda value: round(value, 2)), min_size=2, max_size=8))
def test_sign_flips_by_counting_every_pattern(differences: list[float]) -> None:
    seen = abs(fmean(differences))
    means = [abs(fmean(s * d for s, d in zip(signs, differences, strict=True)))
             for signs in product((1, -1), repeat=len(differences))]  # fmt: skip
    share = sum(mean >= seen - 1e-9 for mean in means) / len(means)
    assert sign_flip_test(differences) == pytest.approx(share)


def test_sign_flips_of_many_data_sets_by_chance_and_by_counting() -> None:
    """Of 16 differences 65,536 patterns are too many to count in the program."""
    differences = [0.4 * ((7 * n) % 5 - 1.4) for n in range(16)]
    total, seen = [0.0], abs(sum(differences))
    for difference in differences:
        total = [value + sign * difference for value in total for sign in (1, -1)]
    exact = sum(abs(value) >= seen - 1e-9 for value in total) / len(total)
    assert sign_flip_test(differences) == pytest.approx(exact, abs=0.015)
    assert sign_flip_test(differences) == sign_flip_test(differences)


@example([0.02, 0.03])
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_what_its_steps_reject(values: list[float]) -> None:
    """Holm's own words: from the smallest p on compare it with level / (how many are left), stop at a miss."""
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for done, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
            if values[place] > level / (len(values) - done):
                break
            rejected.add(place)
        found = {place for place, value in enumerate(holm(values)) if value <= level}
        assert found == rejected or any(abs(value - level) < 1e-12 for value in holm(values))


def test_partial_correlations_are_those_of_residuals_of_ranks() -> None:
    """Too few pairs have none; of others it is the correlation of what regression on the third leaves of each."""
    assert rank_correlation([1, 2], [2, pi]) is rank_correlation([1, 2, 3], [4, 4, 4]) is None
    assert partial_rank_correlation([1, 2, 3], [1, 3, 2], [2, 1, 3]) is None
    assert rank_correlation([1, 2, 2, 9], [3, 5, 5, 4]) == pytest.approx(1 / 3), "equal values share a rank"
    first, second, held = np.random.default_rng(0).normal(size=(3, 9)) + np.arange(9) / 4
    ranks = [values.argsort().argsort() for values in (first, second)]
    rest = [line - np.polyval(np.polyfit(held, line, 1), held) for line in ranks]
    found = partial_rank_correlation(first.tolist(), second.tolist(), held.tolist())
    assert found == pytest.approx(np.corrcoef(*rest)[0, 1], abs=1e-9)
    assert partial_rank_correlation(first, second, [7.0] * 9) == rank_correlation(first, second)
    assert partial_rank_correlation(list(range(9)), second, range(9)) is None, "nothing is left of the first one"


def test_crossed_difference_of_equal_runs_is_the_paired_test_over_samples() -> None:
    """Without differences between runs, only the samples vary: Student's paired t-test over them."""
    per_sample = np.random.default_rng(0).integers(-1, 2, 50).astype(float)
    found = Crossed.over(np.stack([per_sample] * 4))
    expected = scipy.stats.ttest_1samp(per_sample, 0)
    assert found.mean == pytest.approx(per_sample.mean()) and found.freedom == pytest.approx(49)
    assert found.error == pytest.approx(per_sample.std(ddof=1) / sqrt(50)) and found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_crossed_variance_is_that_of_a_random_model() -> None:
    """The mean square of the error over simulations is the variance of the mean: runs, samples and single values."""
    generator, (runs, samples), spread = np.random.default_rng(0), (5, 40), (0.5, 1.0, 2.0)
    found = [
        Crossed.over(
            spread[0] * generator.normal(size=(runs, 1))
            + spread[1] * generator.normal(size=samples)
            + spread[2] * generator.normal(size=(runs, samples))
        )
        for _ in range(2_000)
    ]
    true = spread[0] ** 2 / runs + spread[1] ** 2 / samples + spread[2] ** 2 / (runs * samples)
    assert np.mean([one.error**2 for one in found]) == pytest.approx(true, rel=0.05)
    assert np.mean([one.mean**2 for one in found]) == pytest.approx(true, rel=0.1)
    assert np.mean([one.p < 0.05 for one in found]) <= 0.06, "more false verdicts than promised"


def test_crossed_difference_without_any_spread() -> None:
    assert Crossed.over(np.zeros((5, 100))).p == 1.0
    assert Crossed.over(np.ones((5, 100))).p == 0.0
