"""Timing that can be trusted on a shared machine, and the machine's own limits measured the same way.

Peers alternate, so that a neighbour who wakes up slows all of them; every sample is kept, and medians and quartiles are
derived from them (:mod:`gear_engine.report.statistics`).
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gear_engine.ops import native
from gear_engine.report.facts import commit, device_facts, versions
from gear_engine.report.statistics import summarize

__all__ = ["Ceilings", "alternate", "measure_ceilings", "provenance", "render", "seconds", "write_json"]

#: Bytes to read, larger than any cache that a core or a GPU has to itself, and edge of the matrices to multiply: on a
#: GPU large enough that launching is a small share.
_STREAM_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_MATRIX = {"cpu": 1024, "cuda": 8192}
#: dtypes of products, each narrower than those before it.
RATE_ORDER = ("float32", "bfloat16", "int8")  # as the enumeration in csrc/cpu/multiply_rate.h
#: Seconds.
_LONG_PRODUCT = 0.2


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


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call on a CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Ceilings:
    """What can be reached here: read bandwidth in B/s, multiply rates in op/s (a multiply-add is two)."""

    read_bandwidth: float
    multiply_rate: Mapping[str, float]

    def rate(self, dtype: str) -> float:
        """The multiply rate of ``dtype``, or of a wider one that is faster: narrow numbers may be widened."""
        wider = RATE_ORDER[: RATE_ORDER.index(dtype)]
        return max(self.multiply_rate[dtype], *(self.multiply_rate.get(each, 0.0) for each in wider), 0.0)

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in self.multiply_rate.items())
        return f"read {self.read_bandwidth / 1e9:.1f} GB/s; products: {rates}"

    def record(self) -> dict[str, float]:
        """As a JSON object: ``read_B/s``, and ``<dtype>_op/s``."""
        rates = {f"{name}_op/s": rate for name, rate in self.multiply_rate.items()}
        return {"read_B/s": self.read_bandwidth, **rates}


def measure_ceilings(device: torch.device | str = "cpu", dtypes: Sequence[str] = ("float32",)) -> Ceilings:
    """The best of a few runs: a ceiling is what the machine can do, not what it does on average.

    Bandwidth: the sum of 256 MiB (a GPU: 2 GiB) of int64, integers so that no arithmetic limits it. Rate: the faster
    of a square matrix product by torch (int8 into int32) and, on a CPU, of products whose operands stay in registers.
    """
    device = torch.device(device)
    size = _STREAM_BYTES[device.type]
    stream = torch.ones(size // 8, dtype=torch.int64, device=device)
    bandwidth = size / _shortest(stream.sum, device)
    return Ceilings(bandwidth, {name: _multiply_rate(device, name) for name in dtypes})


def _shortest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of up to nine calls."""
    return min(alternate({"": call}, device=device, warmup=1, repeats=9, budget=0.5)[""])


def _multiply_rate(device: torch.device, dtype: str) -> float:
    """Operations per second in ``dtype``: of a square product, or of products in registers.

    A small one is tried first: where a CPU has no instructions for the dtype, a large one takes seconds. fp32 has them,
    and a busy machine may stretch a small product a hundred times.
    """
    rate = 0.0
    for edge in (_MATRIX[device.type] // 8, _MATRIX[device.type]):
        if dtype != "float32" and rate and 2.0 * edge**3 / rate > _LONG_PRODUCT:
            break
        if dtype == "int8":
            matrix = torch.randint(-127, 128, (edge, edge), dtype=torch.int8, device=device)
            product = functools.partial(torch._int_mm, matrix, matrix)
        else:
            matrix = torch.randn(edge, edge, device=device).to(getattr(torch, dtype))
            product = functools.partial(torch.matmul, matrix, matrix)
        rate = max(rate, 2.0 * edge**3 / _shortest(product, device))
    if device.type == "cpu" and dtype in RATE_ORDER and native.unavailable("multiply_rate_cpu") is None:
        rate = max(rate, native.cpu_kernels().multiply_rate_cpu(RATE_ORDER.index(dtype), 0.1))
    return rate


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
