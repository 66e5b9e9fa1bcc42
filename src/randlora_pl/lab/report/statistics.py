"""Means with confidence intervals, and the few tests that a report needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pandas import Series
from scipy import stats

_FLIPS = 9_999
"""Random sign patterns of a test that has more than these in all; with the one that was seen they are 10,000."""


@dataclass(frozen=True)
class Estimate:
    """A mean of some values and how sure it is; of one value nothing but the mean is known."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        return None if self.std is None else self.std / sqrt(len(self.values))

    @property
    def half(self) -> float | None:
        """Half of the 95 % confidence interval of the mean by Student's t-distribution."""
        return None if self.error is None else _quantile(len(self.values) - 1) * self.error


@dataclass(frozen=True)
class Crossed:
    """A mean over test samples and training runs, which are both drawn at random and meet in every combination.

    Attributes:
        mean: Mean of all values.
        error: Its standard error. The variance over samples and the variance over runs add up, and the variance of
            single values, which is in both, counts once (two-way clustered; Cameron, Gelbach and Miller 2011, section
            2.3). It is never below the larger of the two.
        freedom: Degrees of freedom by Welch and Satterthwaite.
        samples: Number of test samples.
        runs: Number of training runs.
        differing: Number of samples with a value other than zero in any run.
    """

    mean: float
    error: float
    freedom: float
    samples: int
    runs: int
    differing: int

    @classmethod
    def over(cls, values: NDArray[np.float64]) -> "Crossed":
        """Return the mean of values (runs, samples), two or more of each."""
        runs, samples = values.shape
        by_run, by_sample, mean = values.mean(1), values.mean(0), float(values.mean())
        rest = values - by_run[:, None] - by_sample + mean
        parts = by_run.var(ddof=1) / runs, by_sample.var(ddof=1) / samples
        both = (rest**2).sum() / ((runs - 1) * (samples - 1)) / values.size
        variance = max(*parts, sum(parts) - both)
        weights = parts[0] ** 2 / (runs - 1) + parts[1] ** 2 / (samples - 1)
        freedom = float(variance**2 / weights) if weights else samples - 1.0
        return cls(mean, sqrt(variance), freedom, samples, runs, int(values.any(0).sum()))

    @property
    def half(self) -> float:
        """Half of the 95 % confidence interval of the mean by Student's t-distribution."""
        return _quantile(self.freedom) * self.error

    @property
    def p(self) -> float:
        """Two-sided p-value of Student's t-test against zero."""
        if not self.error:
            return float(not self.mean)
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf(0.975, freedom))


def shown(estimate: Estimate | Crossed, form: str = ".1f") -> str:
    """``84.3 ± 0.5`` or ``+0.04 ± 0.20``, the mean alone if it has no interval; never a negative zero."""
    half = "" if estimate.half is None else f" ± {estimate.half:{form.lstrip('+')}}"
    return formatted(estimate.mean, form) + half


def formatted(value: float, form: str = "+.1f") -> str:
    """``+1.3``, never ``-0.0``."""
    text = f"{value:{form}}"
    return text if float(text) else f"{0:{form}}"


def sign_flip_test(differences: Sequence[float]) -> float:
    """Return the two-sided p-value for paired differences symmetric about zero, by flipping the sign of each.

    All sign patterns are counted up to 13 differences, else `_FLIPS` random ones. Of n differences p is at least
    2 / 2**n, so that fewer than six never give p < 0.05.

    Args:
        differences: One for each independent unit, such as a dataset.

    Returns:
        The probability of a mean at least as far from zero if neither side were better.
    """
    mean = lambda values, axis: np.mean(values, axis=axis).round(9)  # so that equal means are ties  # noqa: E731
    options: dict[str, Any] = {"permutation_type": "samples", "n_resamples": _FLIPS, "random_state": 0}
    return float(stats.permutation_test((list(differences),), mean, **options).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p values for their number: each may be compared with 0.05 as it stands."""
    ordered = Series(values, dtype=float).sort_values()
    return list((ordered * np.arange(len(values), 0, -1)).clip(upper=1).cummax().sort_index())


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs or where one side is constant."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(stats.spearmanr(first, second).statistic)


def partial_rank_correlation(first: Sequence[float], second: Sequence[float], held: Sequence[float]) -> float | None:
    """Return Spearman's correlation of two variables, without what a third one explains of their ranks linearly.

    The third one is not ranked, so that nearly equal values of it count as nearly equal.

    Returns:
        The plain correlation where the third variable is constant; None for fewer than four values, where one of the
        two is constant, or where the third explains all of it.
    """
    plain = rank_correlation(first, second)
    if plain is None or len(first) < 4 or len(set(held)) == 1:
        return plain if len(first) > 3 else None
    one, other = (float(stats.pearsonr(stats.rankdata(values), held).statistic) for values in (first, second))
    left = (1 - one**2) * (1 - other**2)
    return (plain - one * other) / sqrt(left) if left > 1e-12 else None
