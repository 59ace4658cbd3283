"""Records for the report tests: small ones made here, and samples recorded on a real machine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gear_engine.report.record import SCHEMA_NAME, SCHEMA_VERSION, UNITS

Record = dict[str, Any]


def make_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "benchmark": "decode_step",
        "params": {"model": "LlamaGen-B", "images": 1},
        "implementation": "cpu",
        "role": "engine",
        "samples": [0.010, 0.011, 0.012, 0.010, 0.011, 0.010, 0.012, 0.011, 0.010, 0.011],
        "device_samples": None,
        "calls_per_sample": 1,
        "warmup_calls": 3,
        "settled": True,
        "bytes": 200_000_000,
        "ops": 400_000_000,
        "rate_dtype": "fp32",
        "items": 1,
        "item": "token",
        "check": None,
        "flags": [],
    }
    return {**row, **changes}


def make_record(rows: list[dict[str, Any]]) -> Record:
    return {
        "schema": SCHEMA_NAME,
        "schema_version": SCHEMA_VERSION,
        "units": dict(UNITS),
        "created": "2026-01-02T03:04:05Z",
        "command": "gear-engine bench --preset quick",
        "preset": "quick",
        "seed": 0,
        "commit": {"hash": "0123456789abcdef", "dirty": False},
        "versions": {"gear_engine": "0.1.0"},
        "device": {
            "kind": "cpu",
            "name": "A CPU, 2 cores",
            "cpu": {
                "model": "A CPU", "instruction_sets": ["avx2"], "isa": "avx2", "cores": 2, "threads": 2,
                "memory": 8_000_000_000, "caches": {"L2": 2_000_000}, "mhz": 2600.0, "virtual": True,
            },
            "gpu": None,
        },
        "settings": {
            "noise_bound": 0.03, "max_seconds_per_row": 1.0, "max_samples": 200, "min_samples": 10,
            "clock": "wall clock", "cache_policy": "one copy", "data": "random",
        },
        "ceilings": {"bandwidth": 4e10, "rates": {"fp32": 1e11, "bf16": 2e11}},
        "conditions": [{"at_s": 0.5, "load": 0.3, "others": 0.01, "steal": 0.0}],
        "rows": rows,
        "skipped": [{"id": "rollout", "reason": "needs --official"}],
    }  # fmt: skip


@pytest.fixture
def record() -> Record:
    return example_record()


def example_record() -> Record:
    """Every kind of row: batches of an engine and its reference, a breakdown, a timeline, a failed check."""
    rng = np.random.default_rng(0)
    rows = []
    for images in (1, 4, 8):
        for name, role, scale in (("cpu", "engine", 1.0), ("reference", "reference", 4.0)):
            samples = (0.01 * scale * images**0.5 * (1 + 0.02 * rng.standard_normal(20))).tolist()
            row = make_row(
                params={"model": "LlamaGen-B", "images": images, "dtype": "fp32"}, implementation=name, role=role,
                samples=samples, items=images,
            )  # fmt: skip
            if role == "engine":
                names = ("qkv", "attention", "swiglu", "gap")
                row["breakdown"] = [{"name": each, "seconds": 0.0025, "calls": 12} for each in names]
                row["check"] = {"passed": images != 8, "error": 1e-6, "bound": 1e-5, "measure": "max|a-b|/max|b|"}
            rows.append(row)
    phases = [{"name": "prefill", "start": 0.0, "end": 0.2}, {"name": "image decoder", "start": 0.2, "end": 1.5}]
    rows.append(
        make_row(
            benchmark="end_to_end",
            params={"model": "LlamaGen-B", "images": 1},
            item="image",
            samples=[1.5, 1.6, 1.4],
            timeline=phases,
            flags=["noise above 3% at the cap"],
            settled=False,
        )
    )
    return make_record(rows)


@pytest.fixture
def recorded() -> Callable[[str], Record]:
    """``recorded("quiet")``, ``recorded("busy")``: runs on a 2-core machine, alone and beside other programs;
    ``recorded("first")``, ``recorded("second")``: two runs of one commit one after the other, alone.
    """
    text = (Path(__file__).parent / "recorded.json").read_text()
    runs = json.loads(text)

    def get(name: str) -> Record:
        return make_record(copy.deepcopy(runs[name]))

    return get
