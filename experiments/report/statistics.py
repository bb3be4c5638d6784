"""The statistics of the report, scipy's wherever it has them.

Intervals are of 95 %: Student's t over seeds, and the percentile bootstrap that resamples the seeds of each task by
themselves (stratified), as rliable does (Agarwal et al. 2021, arXiv 2108.13264), whose probability of improvement and
interquartile mean these are too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0  # of the bootstrap: the same records give the same bytes
ROUNDING = 0.005  # papers print two decimals

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (ddof 1) and 95 % t interval of n values; None where n = 1 gives none."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    n: int


def summarise(values: Sequence[float]) -> Summary | None:
    """Summary of at least one value; None of none."""
    n = len(values)
    if n == 0:
        return None
    mean = float(np.mean(values))
    if n == 1:
        return Summary(mean, None, None, None, 1)
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n)
    return Summary(mean, std, mean - half, mean + half, n)


@dataclass(frozen=True)
class Difference:
    """A difference of two means, its 95 % interval and two-sided p value; None where a single value gives none."""

    value: float
    low: float | None
    high: float | None
    p: float | None


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """first - second, value by value on shared seeds: the paired t test; gaps without spread allow none."""
    gaps = np.subtract(first, second)
    value = float(gaps.mean())
    if np.ptp(gaps) < 1e-12:  # one seed, or coarse scores that happen to agree
        return Difference(value, None, None, None)
    found = stats.ttest_rel(first, second)
    low, high = found.confidence_interval(LEVEL)
    return Difference(value, float(low), float(high), float(found.pvalue))


def to_published(ours: Summary, mean: float, std: float | None, n: int | None) -> Difference:
    """Ours minus a printed mean: Welch's test where its std and n are known, else as if it were exact."""
    value = ours.mean - mean
    if ours.std is None:
        return Difference(value, None, None, None)
    mine = ours.std**2 / ours.n
    theirs = std**2 / n if std is not None and n else 0.0
    if mine + theirs == 0:
        return Difference(value, value, value, 1.0 if abs(value) <= ROUNDING else 0.0)
    freedom = (mine + theirs) ** 2 / (mine**2 / (ours.n - 1) + (theirs**2 / (n - 1) if theirs and n else 0.0))
    error = math.sqrt(mine + theirs)
    low, high = stats.t.interval(LEVEL, freedom, loc=value, scale=error)
    return Difference(value, float(low), float(high), float(2 * stats.t.sf(abs(value) / error, freedom)))


def contains_zero(difference: Difference) -> bool:
    """Whether the interval holds 0, up to the rounding of a printed number; ValueError without an interval."""
    if difference.low is None or difference.high is None:
        raise ValueError("a single value has no interval")
    return difference.low - ROUNDING <= 0 <= difference.high + ROUNDING


def mean_of_means(*groups: Any, axis: int = -1) -> Any:
    """Mean over tasks of their means over seeds."""
    return sum(group.mean(axis=axis) for group in groups) / len(groups)


def interquartile_mean(*groups: Any, axis: int = -1) -> Any:
    """Mean of the middle half of all runs on all tasks."""
    return stats.trim_mean(np.concatenate(groups, axis=axis), 0.25, axis=axis)


def bootstrap(groups: Sequence[Sequence[float]], statistic: Callable[..., Any] = mean_of_means) -> Interval | None:
    """Stratified bootstrap interval of a statistic of groups (tasks) of values (seeds); None if one has no spread."""
    arrays = [np.asarray(group, dtype=float) for group in groups]
    if not arrays or any(len(array) < 2 or np.ptp(array) == 0 for array in arrays):
        return None
    found = stats.bootstrap(
        arrays,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def probability_of_improvement(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of P(a run of `first` beats one of `second`), ties counting half: Mann and Whitney's U."""
    shares = [stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in zip(first, second, strict=True)]
    return float(np.mean(shares))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p values, in their order: the family-wise error stays below the level they are held to."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def at_random_level(accuracy: float, majority_rate: float, n: int) -> bool:
    """Whether `accuracy` on n rows is below the majority rate plus one binomial standard error."""
    error = math.sqrt(majority_rate * (1 - majority_rate) / n)
    return accuracy <= majority_rate + error


def smooth(values: Sequence[float], keep: float) -> np.ndarray:
    """Exponential moving average, (len,) float64, divided by its weight so far: it starts at the first value."""
    averages, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = keep * average + (1 - keep) * value
        averages.append(average / (1 - keep**count))
    return np.asarray(averages)
