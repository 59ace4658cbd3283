"""Holds the sampling loop against busy-waits of known length: ``python -m gear_engine.bench.timer_check``.

Run by hand: on a machine whose cores are shared, a wait may be interrupted. Exit status 1 if a median is off by more
than 3%.
"""

from __future__ import annotations

import sys
import time

import torch

from gear_engine.bench.registry import Implementation
from gear_engine.bench.sampling import Limits, take_samples
from gear_engine.report.statistics import summarize


def main() -> int:
    worst = 0.0
    for seconds in (20e-6, 200e-6, 2e-3, 20e-3):

        def wait(index: int, nanoseconds: int = round(seconds * 1e9)) -> None:
            end = time.monotonic_ns() + nanoseconds
            while time.monotonic_ns() < end:
                pass

        work = [Implementation("wait", "engine", wait)]
        (series,) = take_samples(work, copies=1, limits=Limits(max_seconds=2.0), device=torch.device("cpu"))
        summary = summarize(series.samples)
        error = summary.median / seconds - 1
        worst = max(worst, abs(error))
        print(f"{seconds * 1e6:8.0f} us: median {summary.median * 1e6:10.2f} us, {error:+.2%}, {summary.count} samples")
    print(f"largest error {worst:.2%}, bound 3%")
    return int(worst > 0.03)


if __name__ == "__main__":
    sys.exit(main())
