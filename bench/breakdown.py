"""Where a decode step's time goes: kernel by kernel, and what is gap between kernels.

On a CPU the engine's ops are called one by one with a clock around each; a backend that makes the whole step in one
compiled call is taken apart into the same kernels for this. On a GPU torch.profiler gives the kernels' own times.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gear_engine import Engine
from gear_engine.bench import counts
from gear_engine.ops import GeneratorOps
from gear_engine.ops.skinny_linear import PackedWeight

__all__ = ["step_breakdown"]

_RUNS = 7
GAP = "gap"


class _Clock:
    """Adds up seconds and calls per name during one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def timed(self, name_of: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent = time.perf_counter() - start
            name = name_of(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return call


def _layer_name(engine: Engine) -> Callable[..., str]:
    """Which of the model's linear layers a call is, by its operands."""
    vocab_size = engine.config.vocab_size

    def name(x: torch.Tensor, weight: Any, **around: Any) -> str:
        outputs = weight.out_features if isinstance(weight, PackedWeight) else weight.shape[0]
        if around.get("gate") is not None:
            return "swiglu"
        if around.get("norm_weight") is not None:
            return "head" if outputs == vocab_size else "qkv"
        return "attention-out" if x.shape[1] == engine.config.dim else "ffn-out"

    return name


def _expected(engine: Engine, rows: int, position: int, dtype: str) -> dict[str, counts.Counts]:
    """Bytes and operations of each kernel over the whole step."""
    config = engine.config
    dim, ffn, layers = config.dim, config.ffn_dim, config.n_layer
    width = counts.ACTIVATION_BYTES[dtype]
    attention = counts.decode_attention(rows, config.n_head, config.n_kv_head, config.head_dim, position, width)
    return {
        "qkv": counts.skinny_linear(rows, dim, config.qkv_dim, dtype, norm=True) * layers,
        "attention": attention * layers,
        "attention-out": counts.skinny_linear(rows, dim, dim, dtype, residual=True) * layers,
        "swiglu": counts.skinny_linear(rows, dim, ffn, dtype, norm=True, gate=True) * layers,
        "ffn-out": counts.skinny_linear(rows, ffn, dim, dtype, residual=True) * layers,
        "head": counts.skinny_linear(rows, dim, config.vocab_size, dtype, norm=True),
    }


def step_breakdown(
    engine: Engine, rows: int, position: int, dtype: str, run: Callable[[GeneratorOps], Callable[[int], Any]]
) -> Callable[[], list[dict[str, Any]]]:
    """A function that measures the parts of one step; ``run(ops)`` makes the call that does the step with those ops."""

    def on_cpu() -> list[dict[str, Any]]:
        steps: list[tuple[float, _Clock]] = []
        for _ in range(_RUNS + 2):
            clock = _Clock()
            ops = dataclasses.replace(
                engine.ops,
                skinny_linear=clock.timed(_layer_name(engine), engine.ops.skinny_linear),
                decode_attention=clock.timed(lambda *args, **kwargs: "attention", engine.ops.decode_attention),
                decode_step=None,
            )
            call = run(ops)
            start = time.perf_counter()
            call(0)
            steps.append((time.perf_counter() - start, clock))
        steps = steps[2:]
        expected = _expected(engine, rows, position, dtype)
        parts = []
        for name, counted in expected.items():
            seconds = float(np.median([clock.seconds[name] for _, clock in steps]))
            calls = steps[0][1].calls[name]
            parts.append({"name": name, "seconds": seconds, "calls": calls, "bytes": counted.bytes, "ops": counted.ops})
        gap = float(np.median([max(0.0, total - sum(clock.seconds.values())) for total, clock in steps]))
        return [*parts, {"name": GAP, "seconds": gap, "calls": 0, "bytes": None, "ops": None}]

    def on_gpu() -> list[dict[str, Any]]:
        call = run(engine.ops)
        return _profiled(lambda: call(0), engine.device)

    return on_gpu if engine.device.type == "cuda" else on_cpu


def _profiled(call: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Device time per kernel name over ``_RUNS`` calls, and the gap to the time between two device events."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(_RUNS):
        call()
    end.record()
    torch.cuda.synchronize(device)
    total = start.elapsed_time(end) / 1000 / _RUNS
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_RUNS):
            call()
        torch.cuda.synchronize(device)
    parts = []
    for event in sorted(profiler.key_averages(), key=lambda each: -each.self_device_time_total):
        seconds = event.self_device_time_total / 1e6 / _RUNS
        if seconds > 0:
            parts.append(
                {"name": event.key[:80], "seconds": seconds, "calls": event.count / _RUNS, "bytes": None, "ops": None}
            )
    gap = max(0.0, total - sum(part["seconds"] for part in parts))
    return [*parts, {"name": GAP, "seconds": gap, "calls": 0, "bytes": None, "ops": None}]
