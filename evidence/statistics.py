"""What the protocol computes from the cells' numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ROUNDING = 1e-9
"""Below what differences of errors in percent are those of arithmetic: results have four decimals."""


@dataclass(frozen=True)
class Paired:
    """A method against another, seed by seed: the change of the test error, below 0 if better.

    Args:
        mean: Mean difference, in points.
        error: Its standard error.
        wins: Seeds on which the method's error is lower.
        seeds: How many seeds.
        p: Of a two-sided paired t test; 1 where all differences are equal, whose spread is not known.
    """

    mean: float
    error: float
    wins: int
    seeds: int
    p: float

    @property
    def worse(self) -> bool:
        """Worse by more than two standard errors."""
        return self.mean > 2 * self.error


def paired(method: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare test errors of the same seeds."""
    change = np.asarray(method) - np.asarray(baseline)
    error = standard_error(change)
    p = 1.0
    if error > 0:
        p = float(stats.ttest_rel(method, baseline).pvalue)
    return Paired(float(change.mean()), error, int((change < 0).sum()), len(change), p)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean of two or more values; 0 where they differ in their last digits only."""
    if len(values) > 1 and np.ptp(values) < ROUNDING:
        return 0.0
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def beyond_two_errors(seeds: int) -> float:
    """How likely a mean difference of nothing lies above two standard errors (Student's t)."""
    return float(stats.t.sf(2.0, seeds - 1))


def interval(method: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean difference of the same seeds (Student's t)."""
    change = np.asarray(method) - np.asarray(baseline)
    reach = float(stats.t.ppf(0.975, len(change) - 1)) * standard_error(change)
    return float(change.mean()) - reach, float(change.mean()) + reach


def holm(p: Sequence[float]) -> list[float]:
    """Values of p corrected for their number (Holm, 1979)."""
    corrected = [0.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with its 95 % bootstrap interval over settings."""

    rho: float
    low: float
    high: float
    count: int


def rank_correlation(
    x: Sequence[float], y: Sequence[float], resamples: int = 10_000
) -> Correlation:
    """Spearman's rho of x and y, resampled in pairs with a fixed seed; percentiles."""
    return clustered_rank_correlation([[pair] for pair in zip(x, y, strict=True)], resamples)


def clustered_rank_correlation(
    clusters: Sequence[Sequence[tuple[float, float]]], resamples: int = 10_000
) -> Correlation:
    """Spearman's rho of all pairs; its interval is of whole clusters, resampled with a fixed seed.

    Args:
        clusters: Pairs of x and y, as many in each cluster.
        resamples: How often clusters are drawn.
    """
    if not clusters:
        return Correlation(math.nan, math.nan, math.nan, 0)
    ordered = np.asarray(sorted(sorted(one) for one in clusters))  # whatever order they came in
    chance = np.random.default_rng(0)
    drawn = chance.integers(0, len(ordered), (resamples, len(ordered)))
    x, y = ordered[drawn].reshape(resamples, -1, 2).transpose(2, 0, 1)
    found = _spearman(x, y)
    found = found[np.isfinite(found)]
    rho = float(_spearman(*ordered.reshape(-1, 2).T))
    low = high = math.nan  # where all values of x or y are equal, or one is not finite
    if len(found) and math.isfinite(rho):
        low, high = np.percentile(found, [2.5, 97.5])
    return Correlation(rho, float(low), float(high), ordered[..., 0].size)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlations of arrays (..., settings); NaN where all are equal."""
    a = _centred_ranks(x)
    b = _centred_ranks(y)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def _centred_ranks(x: np.ndarray) -> np.ndarray:
    ranks = stats.rankdata(x, axis=-1)
    return ranks - ranks.mean(-1, keepdims=True)
