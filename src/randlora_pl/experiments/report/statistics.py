"""Means with confidence intervals, and the few tests that a report needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of some values and how sure it is.

    Attributes:
        values: What was averaged.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one value."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for one value."""
        return None if self.std is None else self.std / sqrt(len(self.values))

    @property
    def half(self) -> float | None:
        """Half of the 95 % confidence interval of the mean by Student's t-distribution; None for one value."""
        if self.error is None:
            return None
        from scipy.stats import t  # heavy, and not needed for one seed

        return float(t.ppf((1 + CONFIDENCE) / 2, len(self.values) - 1)) * self.error


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided exact sign test; ties are left out.

    Args:
        wins: Pairs in which the first is better.
        losses: Pairs in which the second is.

    Returns:
        The probability of a split at least as uneven if both were equally good; None without a pair.
    """
    if wins + losses == 0:
        return None
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs or where one side is constant."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)
