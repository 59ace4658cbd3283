"""Runs the cases of a selection and makes the record: the one place that knows the order of things.

Ceilings first; then per case: prepare, check outputs, a control measurement, samples in alternation, a control
measurement again, the parts of a step or the phases of a run. Whatever moved meanwhile is flagged on the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gear_engine.bench import timing
from gear_engine.bench.registry import Case, Context, Skip, Work
from gear_engine.bench.sampling import Limits, Series, take_samples
from gear_engine.cuda_graph import CaptureCost
from gear_engine.errors import BackendUnavailableError, OutOfMemoryError
from gear_engine.report.conditions import ConditionSampler, flags_between
from gear_engine.report.facts import commit, device_facts, versions
from gear_engine.report.privacy import scrub
from gear_engine.report.record import SCHEMA_NAME, SCHEMA_VERSION, UNITS, row_id

__all__ = ["Progress", "Run", "run_cases"]

#: Names of dtypes in reports -> torch's.
_RATE_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
#: Seconds for which a control measurement counts as that of the present.
_FRESH = 1.0
#: Called before every case and after every sample with the number of finished cases and the present case's name.
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Run:
    """What a record says about how it was made."""

    command: str
    preset: str
    limits: Limits
    check: bool
    breakdown: bool


class _Control:
    """A short measurement of the machine itself, repeated around every case."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes, self.edge = (64 << 20, 512) if device.type == "cpu" else (512 << 20, 4096)
        self.stream = torch.ones(self.bytes // 8, dtype=torch.int64, device=device)
        self.matrix = torch.randn(self.edge, self.edge, device=device)

    def measure(self) -> dict[str, float]:
        """Read bandwidth (B/s) and fp32 multiply rate (op/s), medians of 15."""
        calls = {"bandwidth": self.stream.sum, "rate": lambda: self.matrix @ self.matrix}
        samples = timing.alternate(calls, device=self.device, warmup=1, repeats=15)
        work = {"bandwidth": float(self.bytes), "rate": 2.0 * self.edge**3}
        return {name: work[name] / sorted(times)[len(times) // 2] for name, times in samples.items()}


def _ceilings(device: torch.device) -> dict[str, Any]:
    found = timing.measure_ceilings(device, tuple(_RATE_DTYPES.values()))
    rates = {name: found.rate(dtype) for name, dtype in _RATE_DTYPES.items()}
    return {
        "bandwidth": found.read_bandwidth,
        "bandwidth_of": "torch's sum of int64: best over 256 MiB (GPU: 2 GiB), before and after, and of the controls",
        "rates": rates,
        "rates_of": "torch's product of square matrices, edge up to 1024 (GPU: 8192), best of 9, or of products in a "
        "CPU's registers: before and after, and of the controls; bf16 and int8 at least that of the wider kinds, which "
        "they can be widened to",
    }


def _check(work: Work) -> dict[str, dict[str, Any]]:
    """Implementation -> outcome; the reference is not held against itself."""
    if work.check is None:
        return {}
    outcomes = {}
    expected = work.check.reference(0)
    for implementation in work.implementations:
        if implementation.role == "reference":
            continue
        output = implementation.call(0)
        if not isinstance(output, torch.Tensor) or output.shape != expected.shape:
            continue  # a peer whose result has another form
        error = work.check.error(output, expected)
        outcomes[implementation.name] = {
            "passed": bool(error <= work.check.bound),
            "error": error if error == error and abs(error) != float("inf") else None,
            "bound": work.check.bound,
            "measure": work.check.measure,
        }
    return outcomes


def _row(case: Case, work: Work, series: Series) -> dict[str, Any]:
    return {
        "benchmark": case.benchmark.name,
        "params": case.params,
        "implementation": series.implementation.name,
        "role": series.implementation.role,
        "samples": series.samples,
        "device_samples": series.device_samples or None,
        "calls_per_sample": series.calls_per_sample,
        "warmup_calls": series.warmup_calls,
        "settled": series.settled,
        "bytes": None if work.counts is None else work.counts.bytes,
        "ops": None if work.counts is None else work.counts.ops,
        "rate_dtype": work.rate_dtype,
        "items": work.items,
        "item": work.item,
        "buffers": work.copies,
        "check": None,
        "flags": [],
    }


class _Recorder:
    """Runs case after case and collects rows, conditions and what was skipped."""

    def __init__(self, context: Context, run: Run) -> None:
        self.context, self.run = context, run
        self.sampler = ConditionSampler(context.device)
        self.control = _Control(context.device)
        self.rows: list[dict[str, Any]] = []
        self.conditions: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.last = self._condition(self.sampler.snapshot())

    def _condition(self, before: Any) -> dict[str, Any]:
        entry = self.sampler.between(before, self.sampler.snapshot()) | self.control.measure()
        self.conditions.append(entry)
        return entry

    def best(self, name: str) -> float:
        """The highest control measurement so far: a ceiling is not what a busy moment left of it."""
        return max(float(entry[name]) for entry in self.conditions)

    def skip(self, name: str, reason: BaseException | str) -> None:
        self.skipped.append({"id": name, "reason": scrub(" ".join(str(reason).split()))})

    def case(self, case: Case, tick: Callable[[], None]) -> None:
        """Measures one case; what cannot run is listed under ``skipped``."""
        begin = time.monotonic()
        try:
            work = case.benchmark.prepare(case.params, self.context)
        except (Skip, BackendUnavailableError, OutOfMemoryError, torch.OutOfMemoryError) as reason:
            self.skip(case.id, reason)
            return
        for name, why in work.skipped.items():
            self.skip(row_id(case.benchmark.name, case.params, name), why)
        if not work.implementations:
            self.skip(case.id, "no implementation was asked for that runs here")
            return
        outcomes = _check(work) if self.run.check else {}
        before = self.sampler.snapshot()
        if time.monotonic() - begin > _FRESH:
            self.last = self.last | self.control.measure()
        earlier = self.last

        def between_turns() -> None:
            self.sampler.watch()
            tick()

        device, limits = self.context.device, self.run.limits
        every = take_samples(work.implementations, copies=work.copies, limits=limits, device=device, tick=between_turns)
        self.last = self._condition(before)
        flags = flags_between(earlier, self.last)
        control = {name: (earlier[name] * self.last[name]) ** 0.5 for name in ("bandwidth", "rate")}
        if "others" in self.last:
            control["others"] = self.last["others"] + self.last["steal"]
        for series in every:
            row = _row(case, work, series)
            name = series.implementation.name
            row["check"] = outcomes.get(name)
            row["control"] = control
            row["flags"] = flags + self._own_flags(row, work)
            if self.run.breakdown and series.implementation.role == "engine" and name in work.breakdown:
                row["breakdown"] = work.breakdown[name]()
            if name in work.timeline:
                row["timeline"] = work.timeline[name]()
            cost = work.capture[name]() if name in work.capture else CaptureCost()
            if cost.seconds > 0:
                row["capture"] = {"seconds": cost.seconds, "bytes": cost.nbytes}
            self.rows.append(row)

    def _own_flags(self, row: dict[str, Any], work: Work) -> list[str]:
        flags = []
        if row["check"] is not None and not row["check"]["passed"]:
            flags.append("output differs from the reference")
        if not row["settled"]:
            flags.append(f"noise above {self.run.limits.noise_bound:.0%} at the cap")
        return flags


def _cache_policy(context: Context) -> str:
    if not context.rotate_bytes:
        return "one copy of the operands, cache warm"
    return (
        f"operands rotated, up to 64 copies, so that {context.rotate_bytes >> 20} MiB lie between two uses of one; "
        "models: one copy of the weights"
    )


def run_cases(cases: Sequence[Case], context: Context, run: Run, progress: Progress) -> dict[str, Any]:
    """Measures ``cases`` and returns the record; see ``gear_engine/report/schema.json``.

    Raises:
        InvalidRequestError: a case's field has a value that its benchmark does not know.
    """
    device = context.device
    progress(0, "ceilings of this device")
    ceilings = _ceilings(device)
    recorder = _Recorder(context, run)
    for done, case in enumerate(cases):
        progress(done, case.id)
        recorder.case(case, lambda done=done, name=case.id: progress(done, name))  # type: ignore[misc]
    again = _ceilings(device)
    best = recorder.best("rate")
    again["rates"] = {name: max(rate, ceilings["rates"][name], best) for name, rate in again["rates"].items()}
    again["bandwidth"] = max(again["bandwidth"], ceilings["bandwidth"], recorder.best("bandwidth"))
    progress(len(cases), "done")
    limits = run.limits
    return {
        "schema": SCHEMA_NAME,
        "schema_version": SCHEMA_VERSION,
        "units": UNITS,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": run.command,
        "preset": run.preset,
        "seed": context.seed,
        "commit": commit(),
        "versions": versions(),
        "device": device_facts(device, torch.get_num_threads()),
        "settings": {
            "noise_bound": limits.noise_bound,
            "max_seconds_per_row": limits.max_seconds,
            "max_samples": limits.max_samples,
            "min_samples": limits.min_samples,
            "clock": "wall clock (monotonic)" + (", device events beside it" if device.type == "cuda" else ""),
            "cache_policy": _cache_policy(context),
            "data": f"random, seed {context.seed}; random weights",
        },
        "ceilings": again,
        "conditions": recorder.conditions,
        "rows": recorder.rows,
        "skipped": recorder.skipped,
    }
