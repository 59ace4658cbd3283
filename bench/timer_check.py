"""Holds the sampling loop against busy-waits of known length: ``python -m gear_engine.bench.timer_check``.

A wait ends when the raw hardware clock says so, and notes by that clock how long it really was: on a machine that is
shared it may be interrupted, and is then longer than it should be. Exit status 1 if the time that the loop reports is
off by more than 3% of the time that its waits took. Run by hand.
"""

from __future__ import annotations

import sys
import time

import torch

from gear_engine.bench.registry import Implementation
from gear_engine.bench.sampling import Limits, take_samples
from gear_engine.report.statistics import summarize

BOUND = 0.03
#: Not the clock of the loop under test, and not slewed by time servers.
_CLOCK = time.CLOCK_MONOTONIC_RAW if hasattr(time, "CLOCK_MONOTONIC_RAW") else time.CLOCK_MONOTONIC


def check(seconds: float, limits: Limits) -> tuple[float, float, int]:
    """(reported / really waited - 1, reported median / ``seconds`` - 1, samples) for waits of ``seconds``."""
    waited: list[int] = []

    def wait(index: int, nanoseconds: int = round(seconds * 1e9)) -> None:
        start = time.clock_gettime_ns(_CLOCK)
        while time.clock_gettime_ns(_CLOCK) - start < nanoseconds:
            pass
        waited.append(time.clock_gettime_ns(_CLOCK) - start)

    work = [Implementation("wait", "engine", wait)]
    (series,) = take_samples(work, copies=1, limits=limits, device=torch.device("cpu"))
    timed = len(series.samples) * series.calls_per_sample  # the last ones; those before warmed up
    reported = sum(series.samples) * series.calls_per_sample
    return (
        reported / (sum(waited[-timed:]) * 1e-9) - 1,
        summarize(series.samples).median / seconds - 1,
        len(series.samples),
    )


def main() -> int:
    worst = interrupted = 0.0
    for seconds in (20e-6, 200e-6, 2e-3, 20e-3):
        error, of_nominal, samples = check(seconds, Limits(max_seconds=2.0))
        worst, interrupted = max(worst, abs(error)), max(interrupted, abs(of_nominal))
        print(
            f"{seconds * 1e6:8.0f} us: reported against waited {error:+.2%}; median against the length asked for "
            f"{of_nominal:+.2%}; {samples} samples"
        )
    print(f"largest error {worst:.2%}, bound {BOUND:.0%}")
    if interrupted > BOUND:
        print("The waits were longer than asked for: other programs interrupted them. Medians need a quiet machine.")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
