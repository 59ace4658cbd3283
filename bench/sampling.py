"""Samples of several implementations of the same work, taken in alternation until they can be quoted.

Warm-up until three calls in a row agree, then rounds of one turn (10 ms of samples, at least one) per implementation,
each round starting with another one, so that a machine that slows down slows all of them. An implementation is done
when half the 95% interval of its median is at most the noise bound (after a quarter of the cap), or at its cap of
seconds or samples; which of the two is recorded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gear_engine.bench.registry import Implementation
from gear_engine.report.statistics import summarize

__all__ = ["Limits", "Series", "take_samples"]

#: A sample holds so many calls that it lasts at least this long: clock and loop overhead stay below 0.1%.
_SHORTEST_SAMPLE = 1e-3
_WARMUP_AGREEMENT = 0.1
#: How long OpenMP's workers may spin after their work; how long a turn of short samples is;
#: samples beside which both are nothing.
_SPIN = 8e-3
_TURN = 10e-3
_LONG_SAMPLE = 0.2


@dataclass(frozen=True)
class Limits:
    """When to stop: noise at most ``noise_bound`` after ``min_samples``, or the cap of seconds or samples per row."""

    noise_bound: float = 0.03
    max_seconds: float = 2.0
    min_samples: int = 10
    max_samples: int = 200
    #: Taken even past ``max_seconds``, where a single call is that long.
    least_samples: int = 3


@dataclass
class Series:
    """The samples of one implementation, in seconds per call."""

    implementation: Implementation
    calls_per_sample: int = 1
    warmup_calls: int = 0
    samples: list[float] = field(default_factory=list)
    device_samples: list[float] = field(default_factory=list)
    spent: float = 0.0
    settled: bool = False
    done: bool = False

    def judge(self, limits: Limits) -> None:
        """Decides whether enough was seen."""
        count = len(self.samples)
        # A quarter of the cap at least: disturbances last, and ten quick samples may all lie in one.
        if count >= limits.min_samples and self.spent >= limits.max_seconds / 4:
            self.settled = summarize(self.device_samples or self.samples).noise <= limits.noise_bound
        over = self.spent >= limits.max_seconds and count >= limits.least_samples
        self.done = self.settled or over or count >= limits.max_samples


class _Timer:
    """Times ``count`` calls: the wall clock around work that has ended, and on a GPU events around the same work."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.next_copy = 0

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[int], Any], count: int, copies: int) -> tuple[float, float | None]:
        """(wall, device) seconds per call; device is None on a CPU."""
        first = self.next_copy
        self.next_copy += count
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []
        self._synchronize()
        start = time.perf_counter()
        if self.cuda:
            events[0].record()
        for index in range(first, first + count):
            call(index % copies)
        if self.cuda:
            events[1].record()
        self._synchronize()
        wall = (time.perf_counter() - start) / count
        return wall, events[0].elapsed_time(events[1]) / 1000 / count if self.cuda else None


def _warm_up(series: Series, timer: _Timer, copies: int, limits: Limits) -> None:
    """Calls until three in a row agree within 10% or a quarter of the cap is spent; then sets the calls per sample.

    The first call compiles, allocates and builds tables. Where it alone is longer than the cap, it is the warm-up.
    """
    call = series.implementation.call
    first, _ = timer.time(call, 1, copies)
    series.warmup_calls = 1
    if first > limits.max_seconds:
        return
    recent: list[float] = []
    spent = 0.0
    while len(recent) < 3 or max(recent[-3:]) > (1 + _WARMUP_AGREEMENT) * min(recent[-3:]):
        seconds, _ = timer.time(call, 1, copies)
        recent.append(seconds)
        spent += seconds
        if spent > limits.max_seconds / 4:
            break
    series.warmup_calls = 1 + len(recent)
    series.calls_per_sample = max(1, math.ceil(_SHORTEST_SAMPLE / min(recent)))


def _hand_over(series: Series) -> None:
    """Untimed calls, until the previous implementation's threads sleep and this one's are awake on their cores.

    OpenMP's workers spin for a few milliseconds after their work; where all cores are in use they would take time from
    an implementation with threads of its own. A pause would not do: waking from it costs more than the spinning.
    """
    if series.samples and series.samples[-1] * series.calls_per_sample > _LONG_SAMPLE:
        return
    start = time.perf_counter()
    while time.perf_counter() - start < _SPIN:
        series.implementation.call(0)


def _sample(series: Series, timer: _Timer, copies: int) -> None:
    wall, on_device = timer.time(series.implementation.call, series.calls_per_sample, copies)
    series.samples.append(wall)
    if on_device is not None:
        series.device_samples.append(on_device)
    series.spent += wall * series.calls_per_sample


def take_samples(
    implementations: Sequence[Implementation],
    *,
    copies: int,
    limits: Limits,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> list[Series]:
    """Measures all ``implementations`` in alternation; ``tick`` is called after every turn."""
    every = [Series(implementation) for implementation in implementations]
    timer = _Timer(device)
    for series in every:
        _warm_up(series, timer, copies, limits)
        tick()
    turn = 0
    while any(not series.done for series in every):
        for offset in range(len(every)):
            series = every[(turn + offset) % len(every)]
            if series.done:
                continue
            if len(every) > 1 and device.type == "cpu":
                _hand_over(series)
            end = series.spent + _TURN
            while series.spent < end and not series.done:
                _sample(series, timer, copies)
                series.judge(limits)
            tick()
        turn += 1
    return every
