"""How the machine was while it was measured: clocks, load, stolen time, throttling; and what of it to flag.

The counters of a case are differences of two snapshots around it; clocks, power, temperature and throttling are also
sampled between its turns, where a GPU is warm from its work.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gear_engine.report import nvml

__all__ = ["ConditionSampler", "Snapshot", "flags_between"]

#: Moves beyond these are flagged on the rows that they fell on.
CLOCK_MOVE = 0.05
STEAL_SHARE = 0.02
OTHERS_SHARE = 0.05
CONTROL_MOVE = 0.10
POWER_MOVE = 0.25
TEMPERATURE_MOVE = 8.0
#: Seconds between two samples during a case.
_PERIOD = 0.2
#: What is sampled during a case: key -> (label, unit, share by which it may move).
_WATCHED = {
    "mhz": ("CPU clock", "MHz", CLOCK_MOVE),
    "sm_clock_mhz": ("SM clock", "MHz", CLOCK_MOVE),
    "memory_clock_mhz": ("memory clock", "MHz", CLOCK_MOVE),
    "power_w": ("power", "W", POWER_MOVE),
    "temperature_c": ("temperature", "°C", None),
}


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment.

    Attributes:
        at: seconds of the monotonic clock.
        total, busy, steal: CPU seconds of the whole machine since boot, from /proc/stat; None where there is none.
        own: CPU seconds of this process.
        values: what is not a counter: load, clocks, power, temperature, throttling.
    """

    at: float
    total: float | None
    busy: float | None
    steal: float | None
    own: float
    values: dict[str, Any]


class ConditionSampler:
    """Takes snapshots and turns two of them into the ``conditions`` entry of what lies between."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = (device.index or 0) if device.type == "cuda" else None
        self._start = time.monotonic()
        self._readings: list[dict[str, Any]] = []
        self._last = -math.inf

    def watch(self) -> None:
        """Samples what moves, if the last sample is old; called between turns, outside of what is timed."""
        now = time.monotonic()
        if now - self._last >= _PERIOD:
            self._last = now
            self._readings.append(self._values())

    def _values(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        clock = _mhz()
        if clock is not None:
            values["mhz"] = clock
        if self._gpu is not None:
            values |= nvml.sample(self._gpu)
        return values

    def snapshot(self) -> Snapshot:
        times = _proc_stat()
        values: dict[str, Any] = {"load": os.getloadavg()[0], **self._values()}
        total = busy = steal = None
        if times is not None:
            total, busy, steal = times
        used = os.times()
        own = used.user + used.system + used.children_user + used.children_system
        return Snapshot(time.monotonic(), total, busy, steal, own, values)

    def between(self, before: Snapshot, after: Snapshot) -> dict[str, Any]:
        """``at_s`` (of ``after``, since the sampler was made), its values, and shares of CPU time since ``before``.

        With samples taken by :meth:`watch` since the last call, their ranges and every reason for throttling.
        """
        entry = {"at_s": round(after.at - self._start, 3), **after.values}
        readings, self._readings = self._readings, []
        ranges = {}
        for name in _WATCHED:
            seen = [reading[name] for reading in readings if name in reading]
            if seen:
                ranges[name] = [min(seen), max(seen)]
        if ranges:
            entry["ranges"] = ranges
        reasons = {reason for reading in [*readings, after.values] for reason in reading.get("throttle", [])}
        if reasons:
            entry["throttle"] = sorted(reasons)
        if None not in (before.total, after.total, before.busy, after.busy, before.steal, after.steal):
            elapsed = after.total - before.total  # type: ignore[operator]
            # Ticks are 10 ms: over shorter stretches a share says nothing.
            if elapsed >= 0.2:
                others = (after.busy - before.busy) - (after.own - before.own)  # type: ignore[operator]
                entry["others"] = round(max(0.0, others / elapsed), 4)
                entry["steal"] = round(max(0.0, (after.steal - before.steal) / elapsed), 4)  # type: ignore[operator]
        return entry


def _proc_stat() -> tuple[float, float, float] | None:
    """(total, busy, steal) CPU seconds since boot."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (float(field) for field in fields[:8])
    tick = os.sysconf("SC_CLK_TCK")
    busy = user + nice + system + irq + softirq
    return (busy + idle + iowait + steal) / tick, busy / tick, steal / tick


def _mhz() -> float | None:
    """Mean clock of all processors as /proc/cpuinfo tells; a virtual machine shows a constant."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def flags_between(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What moved between two ``conditions`` entries or disturbed the time between them, in words."""
    found = []
    for name, (low, high) in after.get("ranges", {}).items():
        label, unit, share = _WATCHED[name]
        moved = high - low > TEMPERATURE_MOVE if share is None else high > low * (1 + share)
        if moved:
            found.append(f"{label} moved between {low:.0f} and {high:.0f} {unit}")
    for name, label in (("bandwidth", "bandwidth"), ("rate", "multiply rate")):
        if before.get(name) and after.get(name):
            move = after[name] / before[name] - 1
            if abs(move) > CONTROL_MOVE:
                found.append(f"control {label} moved {move:+.0%}")
    if after.get("steal", 0) > STEAL_SHARE:
        found.append(f"hypervisor took {after['steal']:.0%} of the CPU time")
    if after.get("others", 0) > OTHERS_SHARE:
        found.append(f"other processes used {after['others']:.0%} of the CPU time")
    for reason in after.get("throttle", []):
        found.append(f"throttled: {reason}")
    return found
