"""The few statistics of the report: mean, sample std, t interval, the level of a guesser, smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


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
    half = float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n)
    return Summary(mean, std, mean - half, mean + half, n)


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
