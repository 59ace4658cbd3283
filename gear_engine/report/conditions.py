"""How the machine was while it was measured: clocks, load, stolen time, throttling; and what of it to flag."""

from __future__ import annotations

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

    def snapshot(self) -> Snapshot:
        times = _proc_stat()
        values: dict[str, Any] = {"load": os.getloadavg()[0]}
        clock = _mhz()
        if clock is not None:
            values["mhz"] = clock
        if self._gpu is not None:
            values |= nvml.sample(self._gpu)
        total = busy = steal = None
        if times is not None:
            total, busy, steal = times
        used = os.times()
        own = used.user + used.system + used.children_user + used.children_system
        return Snapshot(time.monotonic(), total, busy, steal, own, values)

    def between(self, before: Snapshot, after: Snapshot) -> dict[str, Any]:
        """``at_s`` (of ``after``, since the sampler was made), its values, and shares of CPU time since ``before``."""
        entry = {"at_s": round(after.at - self._start, 3), **after.values}
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
    for name, label in (("mhz", "CPU clock"), ("sm_clock_mhz", "SM clock"), ("memory_clock_mhz", "memory clock")):
        if before.get(name) and after.get(name):
            move = after[name] / before[name] - 1
            if abs(move) > CLOCK_MOVE:
                found.append(f"{label} moved {move:+.0%}")
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
