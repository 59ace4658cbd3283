"""Timing that can be trusted on a shared machine, and the machine's own limits measured the same way.

Peers alternate, so that a neighbour who wakes up slows all of them; every sample is kept, and medians and quartiles are
derived from them (:mod:`gear_engine.report.statistics`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gear_engine.report.facts import commit, device_facts, versions
from gear_engine.report.statistics import summarize

__all__ = ["Ceilings", "alternate", "measure_ceilings", "provenance", "render", "write_json"]

#: Larger than any cache that a CPU core or a GPU has to itself.
_STREAM_BYTES = 256 << 20
_MATRIX = 1024


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    repeats: int = 15,
    budget: float = 60.0,
) -> dict[str, list[float]]:
    """Seconds of every call, peers in turn.

    Args:
        calls: name -> function without arguments; its result is dropped.
        device: synchronised before and after every sample.
        warmup: rounds whose times are dropped.
        repeats: rounds that count.
        budget: seconds after which no further round begins, once there are three.

    Returns:
        name -> samples in the order in which they were taken; equally many for each.
    """
    synchronize = _synchronizer(torch.device(device))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for round_ in range(warmup + repeats):
        if round_ >= warmup + 3 and time.perf_counter() - begin > budget:
            break
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if round_ >= warmup:
                samples[name].append(time.perf_counter() - start)
    return samples


@dataclass(frozen=True)
class Ceilings:
    """What plain torch reaches here: read bandwidth in B/s, multiply rates in op/s (a multiply-add is two)."""

    read_bandwidth: float
    multiply_rate: Mapping[str, float]


def measure_ceilings(device: torch.device | str = "cpu", dtypes: Sequence[str] = ("float32",)) -> Ceilings:
    """The best of a few runs: a ceiling is what the machine can do, not what it does on average.

    Bandwidth: the sum of 256 MiB of int64 (integer, so that no arithmetic limits it). Rate: a square matrix product.
    """
    device = torch.device(device)
    stream = torch.ones(_STREAM_BYTES // 8, dtype=torch.int64, device=device)
    calls: dict[str, Callable[[], Any]] = {"read": lambda: stream.sum()}
    for name in dtypes:
        matrix = torch.randn(_MATRIX, _MATRIX, device=device).to(getattr(torch, name))
        calls[name] = lambda matrix=matrix: matrix @ matrix  # type: ignore[misc]
    best = {name: min(times) for name, times in alternate(calls, device=device, repeats=9, budget=10).items()}
    return Ceilings(_STREAM_BYTES / best["read"], {name: 2.0 * _MATRIX**3 / best[name] for name in dtypes})


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Device, versions and commit: what travels with every number."""
    facts = device_facts(torch.device(device), torch.get_num_threads())
    return {"device": facts, "versions": versions(), "commit": commit()}


def statistics(samples: Sequence[float]) -> dict[str, float]:
    """Median and spread of one row, in milliseconds."""
    summary = summarize(samples)
    scale = 1e3
    return {
        "runs": summary.count,
        "median_ms": summary.median * scale,
        "p10_ms": summary.p10 * scale,
        "p90_ms": summary.p90 * scale,
        "iqr_ms": summary.iqr * scale,
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 0
        return f"{value:.{digits}f}"
    return "-" if value is None else str(value)


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of ``rows``; the first row's keys are the columns."""
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    Path(path).write_text(json.dumps(record, indent=1) + "\n")
