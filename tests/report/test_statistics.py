"""Proves the report's statistics against values worked out by hand or taken from a t table."""

import numpy as np
import pytest
from scipy import stats

from experiments.report.grid import rate_text
from experiments.report.statistics import (
    Difference,
    Summary,
    at_random_level,
    bootstrap,
    contains_zero,
    holm,
    interquartile_mean,
    mean_of_means,
    paired,
    probability_of_improvement,
    smooth,
    summarise,
    to_published,
)


def test_mean_sample_std_and_interval() -> None:
    summary = summarise([1.0, 2.0, 3.0])
    assert summary is not None
    assert (summary.mean, summary.std, summary.n) == (2.0, 1.0, 3)
    half = 4.302653 / 3**0.5  # t table, 2 degrees of freedom, 97.5 %
    assert (summary.low, summary.high) == pytest.approx((2 - half, 2 + half))


def test_one_value_has_no_spread_and_none_no_summary() -> None:
    summary = summarise([5.0])
    assert summary is not None
    assert (summary.mean, summary.std, summary.low, summary.n) == (5.0, None, None, 1)
    assert summarise([]) is None


def test_random_level_ends_one_binomial_standard_error_above_the_majority_rate() -> None:
    assert at_random_level(0.5249, 0.5, 400)  # the error is sqrt(.25 / 400) = 0.025
    assert not at_random_level(0.5251, 0.5, 400)
    assert at_random_level(0.1, 0.5, 400)


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smooth([4.0, 4.0, 4.0], 0.9) == pytest.approx([4.0, 4.0, 4.0])
    assert smooth([1.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3])


@pytest.mark.parametrize(("rate", "text"), [(1e-3, "1e-3"), (2.5e-4, "2.5e-4"), (3e-5, "3e-5"), (0.5, "5e-1")])
def test_rate_text(rate: float, text: str) -> None:
    assert rate_text(rate) == text


def summary(values: list[float]) -> Summary:
    found = summarise(values)
    assert found is not None
    return found


def test_paired_difference_is_scipys_and_single_or_constant_ones_are_said_as_such() -> None:
    found = paired([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5  # the gaps 2, 3, 1 have std 1
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half))
    assert paired([3.0], [1.0]) == Difference(2.0, None, None, None)
    assert paired([3.0, 4.0], [1.0, 2.0]) == Difference(2.0, None, None, None)


def test_difference_to_a_printed_mean_is_welchs() -> None:
    ours, theirs = [80.0, 81.0, 83.0, 84.0], [79.0, 79.5, 80.5]
    found = to_published(summary(ours), np.mean(theirs), np.std(theirs, ddof=1), 3)
    oracle = stats.ttest_ind(ours, theirs, equal_var=False)
    interval = oracle.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, oracle.pvalue))


def test_a_printed_mean_without_std_is_taken_as_exact() -> None:
    found = to_published(summary([1.0, 2.0, 3.0]), 1.0, None, 3)
    assert found.p == pytest.approx(stats.ttest_1samp([1.0, 2.0, 3.0], 1.0).pvalue)
    assert to_published(summary([1.0]), 1.0, 0.1, 3).p is None
    with pytest.raises(ValueError, match="no interval"):
        contains_zero(to_published(summary([1.0]), 1.0, 0.1, 3))


def test_rounding_of_a_printed_number_is_no_difference() -> None:
    assert contains_zero(to_published(summary([54.204, 54.204]), 54.2, 0.0, 3))
    assert not contains_zero(to_published(summary([54.21, 54.21]), 54.2, 0.0, 3))


def test_probability_of_improvement_by_counting() -> None:
    assert probability_of_improvement([[2.0, 3.0]], [[1.0, 2.0]]) == pytest.approx(3.5 / 4)
    assert probability_of_improvement([[2.0], [0.0]], [[1.0], [1.0]]) == 0.5


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_interquartile_mean_drops_the_quarters() -> None:
    assert interquartile_mean(np.array([0.0, 4.0]), np.array([5.0, 100.0])) == pytest.approx(4.5)


def test_bootstrap_is_seeded_and_needs_spread() -> None:
    groups = [[1.0, 2.0, 3.0], [4.0, 6.0, 5.0]]
    assert bootstrap(groups) == bootstrap(groups)
    assert bootstrap([[1.0, 1.0]]) is None and bootstrap([[1.0]]) is None


# Coverage: in 1,500 simulated experiments the share of intervals that hold the truth, to three standard errors.
SIMULATED = 1500
ERROR = 3 * (0.95 * 0.05 / SIMULATED) ** 0.5


@pytest.mark.parametrize("n", [2, 3, 5])
def test_t_intervals_cover_the_true_mean(n: int) -> None:
    drawn = np.random.default_rng(n).normal(70.0, 2.0, (SIMULATED, n))
    found = [summary(list(values)) for values in drawn]
    held = np.mean([known.low <= 70.0 <= known.high for known in found if known.low is not None and known.high])
    assert held == pytest.approx(0.95, abs=ERROR)


def test_paired_intervals_cover_the_true_gap_though_seeds_share_their_luck() -> None:
    rng = np.random.default_rng(7)
    luck = rng.normal(0.0, 5.0, (SIMULATED, 3))
    first = 71.0 + luck + rng.normal(0.0, 0.5, luck.shape)
    second = 70.0 + luck + rng.normal(0.0, 0.5, luck.shape)
    found = [paired(list(x), list(y)) for x, y in zip(first, second, strict=True)]
    assert np.mean([known.low <= 1.0 <= known.high for known in found]) == pytest.approx(0.95, abs=ERROR)  # type: ignore[operator]


@pytest.mark.parametrize("gap", [0.0, 20.0])
def test_verdicts_are_right_at_their_level(gap: float) -> None:
    """Three seeds against three: nineteen of twenty equal means are within, nearly all of far ones are outside."""
    rng = np.random.default_rng(11)
    ours = rng.normal(70.0 + gap, 1.0, (SIMULATED, 3))
    theirs = rng.normal(70.0, 1.5, (SIMULATED, 3))
    within = np.mean(
        [
            contains_zero(to_published(summary(list(x)), y.mean(), y.std(ddof=1), 3))
            for x, y in zip(ours, theirs, strict=True)
        ]
    )
    if gap:
        assert within < 0.01
    else:
        assert 0.95 - ERROR <= within <= 0.98  # Welch's is cautious with so few seeds


def test_stratified_bootstrap_covers_the_mean_over_tasks() -> None:
    """Ten seeds on each of three tasks of unlike levels; percentile intervals of few seeds are a little narrow."""
    rng = np.random.default_rng(13)
    levels = np.array([90.0, 75.0, 50.0])
    held = []
    for _ in range(300):
        interval = bootstrap([list(rng.normal(level, 2.0, 10)) for level in levels], mean_of_means)
        assert interval is not None
        held.append(interval[0] <= levels.mean() <= interval[1])
    assert 0.88 <= np.mean(held) <= 0.98


def test_holm_keeps_the_family_wise_error() -> None:
    rng = np.random.default_rng(17)
    wrong = [min(holm(list(values))) < 0.05 for values in rng.uniform(size=(SIMULATED, 8))]
    assert np.mean(wrong) <= 0.05 + ERROR
