"""Medians that can be quoted: percentiles, the interval of a median, and the ratio of two medians with its interval.

Nothing here assumes normal noise. Timings of one process come in runs (a neighbour wakes up, a clock drops), so the
bootstrap resamples blocks of consecutive samples: single ones would make the interval too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "Summary", "median_interval", "ratio_of_medians", "summarize"]

PERCENTILES = (10, 25, 50, 75, 90, 99)
_RESAMPLES = 4000
#: Two-sided 97.5% quantiles of Student's t for 1 ... 10 degrees of freedom; 1.96 in the limit.
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.96


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval; the bounds may be 0 and infinity when nothing can be said."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Order statistics of one row's samples, in the samples' unit.

    Attributes:
        count: number of samples.
        median, p10, p25, p75, p90, p99: percentiles, linearly interpolated.
        iqr: p75 - p25.
        noise: half the 95% interval of the median, over the median.
    """

    count: int
    median: float
    p10: float
    p25: float
    p75: float
    p90: float
    p99: float
    iqr: float
    noise: float


def median_interval(samples: Sequence[float]) -> Interval:
    """The median and its distribution-free 95% interval, from order statistics.

    The interval between the l-th smallest and the l-th largest of n samples holds the median with probability
    1 - 2 P(Binomial(n, 1/2) < l). Fewer than six samples cannot reach 95%: then the range is widened by Student's
    factor for so few.
    """
    ordered = sorted(samples)
    count = len(ordered)
    middle = float(np.median(ordered))
    if count < 6:
        factor = math.inf if count < 2 else _STUDENT[count - 2] / _NORMAL
        low = middle - (middle - ordered[0]) * factor if count > 1 else 0.0
        high = middle + (ordered[-1] - middle) * factor if count > 1 else math.inf
        return Interval(middle, max(low, 0.0), high)
    tail, rank = 0.0, 0
    while True:
        tail += math.comb(count, rank) / 2**count
        if tail > 0.025:
            break
        rank += 1
    return Interval(middle, ordered[rank - 1], ordered[count - rank])


def summarize(samples: Sequence[float]) -> Summary:
    """Order statistics of ``samples``; at least one."""
    p10, p25, p50, p75, p90, p99 = (float(v) for v in np.percentile(np.asarray(samples, dtype=float), PERCENTILES))
    interval = median_interval(samples)
    noise = (interval.high - interval.low) / 2 / interval.value
    return Summary(len(samples), p50, p10, p25, p75, p90, p99, p75 - p25, noise)


def _bootstrap_medians(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians of resampled series: blocks of about sqrt(n) consecutive samples, wrapping around at the end."""
    count = len(samples)
    length = max(1, round(math.sqrt(count)))
    blocks = -(-count // length)
    starts = rng.integers(0, count, size=(_RESAMPLES, blocks))
    index = (starts[:, :, None] + np.arange(length)) % count  # [resamples, blocks, length]
    medians: np.ndarray = np.median(samples[index.reshape(_RESAMPLES, -1)[:, :count]], axis=1)
    return medians


def ratio_of_medians(
    baseline: Sequence[float], other: Sequence[float], *, comparisons: int = 1, seed: int = 0
) -> Interval:
    """median(other) / median(baseline), with an interval that holds it with 95% for all ``comparisons`` together.

    A block bootstrap on both sides. The interval of one comparison is taken at 1 - 0.05 / comparisons (Bonferroni), so
    that a table of fifty rows does not name two by chance. Series of few blocks say little about their own spread; the
    interval is widened by Student's factor for so few, and is (0, infinity) if a side has a single sample.
    """
    a, b = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
    value = float(np.median(b) / np.median(a))
    fewest = min(len(a), len(b))
    if fewest < 2:
        return Interval(value, 0.0, math.inf)
    rng = np.random.default_rng(seed)
    logs = np.log(_bootstrap_medians(b, rng)) - np.log(_bootstrap_medians(a, rng))
    tail = 100 * max(0.025 / comparisons, 1 / _RESAMPLES)
    low, high = np.percentile(logs, (tail, 100 - tail))
    blocks = -(-fewest // max(1, round(math.sqrt(fewest))))
    factor = _STUDENT[blocks - 2] / _NORMAL if blocks - 2 < len(_STUDENT) else 1.1
    centre = math.log(value)
    return Interval(
        value,
        math.exp(centre - (centre - min(low, centre)) * factor),
        math.exp(centre + (max(high, centre) - centre) * factor),
    )
