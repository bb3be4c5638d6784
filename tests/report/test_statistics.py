"""Proves the report's statistics against values worked out by hand or taken from a t table."""

import pytest

from experiments.report.grid import rate_text
from experiments.report.statistics import at_random_level, smooth, summarise


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
