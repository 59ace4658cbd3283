from __future__ import annotations

import math

import numpy as np
import pytest

from gear_engine.report.statistics import median_interval, ratio_of_medians, summarize


def test_summary_of_known_numbers() -> None:
    summary = summarize([float(i) for i in range(1, 102)])  # 1 ... 101
    assert (summary.count, summary.median, summary.p10, summary.p25) == (101, 51, 11, 26)
    assert (summary.p75, summary.p90, summary.p99, summary.iqr) == (76, 91, 100, 50)


def test_interval_of_the_median_by_the_binomial_table() -> None:
    # For n = 20 the 6th and the 15th order statistic hold the median with 95.9%; the 7th and 14th with 88.5%.
    interval = median_interval([float(i) for i in range(1, 21)])
    assert (interval.low, interval.value, interval.high) == (6, 10.5, 15)


def test_few_samples_say_less() -> None:
    assert median_interval([1.0]).high == math.inf
    two, five = median_interval([0.9, 1.1]), median_interval([0.9, 0.95, 1.0, 1.05, 1.1])
    assert two.high - two.low > five.high - five.low > 0.2


def test_interval_covers_the_true_median() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        interval = median_interval(rng.lognormal(size=15).tolist())  # true median 1
        held += interval.low <= 1 <= interval.high
    assert held >= 0.93 * 400


@pytest.mark.parametrize("factor", [1.0, 1.1, 0.5])
def test_ratio_finds_the_factor(factor: float) -> None:
    rng = np.random.default_rng(2)
    a = 1 + 0.02 * rng.standard_normal(60)
    b = factor * (1 + 0.02 * rng.standard_normal(60))
    ratio = ratio_of_medians(a.tolist(), b.tolist(), comparisons=40)
    assert ratio.low < factor < ratio.high
    assert ratio.high / ratio.low < 1.1


def test_ratio_under_no_change_rarely_excludes_one() -> None:
    rng = np.random.default_rng(3)
    outside = 0
    for seed in range(100):
        a, b = 1 + 0.05 * rng.standard_normal((2, 20))
        ratio = ratio_of_medians(a.tolist(), b.tolist(), seed=seed)
        outside += not ratio.low <= 1 <= ratio.high
    assert outside <= 8  # 5 of 100 by construction


def test_slow_drift_widens_the_ratio() -> None:
    """Samples that drift together carry less information than as many independent ones."""
    rng = np.random.default_rng(4)
    noise = 0.05 * rng.standard_normal(64)
    steady = (1 + noise).tolist()
    drifting = (1 + np.sort(noise)).tolist()
    quiet, moved = (ratio_of_medians(steady, other) for other in (steady, drifting))
    assert moved.high / moved.low > quiet.high / quiet.low


def test_one_sample_says_nothing() -> None:
    ratio = ratio_of_medians([1.0], [1.5])
    assert (ratio.low, ratio.high) == (0.0, math.inf)
