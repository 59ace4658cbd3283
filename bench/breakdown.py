"""Where the time of a decode step or a rollout goes: kernel by kernel, and what is gap between kernels.

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
from gear_engine.config import GeneratorConfig
from gear_engine.ops import GeneratorOps
from gear_engine.ops.skinny_linear import PackedWeight

__all__ = ["breakdown", "rollout_counts", "step_counts"]

#: Runs whose median counts; fewer where they take long.
_RUNS, _SECONDS = 7, 2.0
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


def _linear_counts(config: GeneratorConfig, rows: int, dtype: str, first_out: int) -> dict[str, counts.Counts]:
    """Bytes and operations of the linear layers over all blocks; the first projection has ``first_out`` outputs."""
    dim, ffn, layers = config.dim, config.ffn_dim, config.n_layer
    return {
        "qkv": counts.skinny_linear(rows, dim, first_out, dtype, norm=True) * layers,
        "attention-out": counts.skinny_linear(rows, dim, dim, dtype, residual=True) * layers,
        "swiglu": counts.skinny_linear(rows, dim, ffn, dtype, norm=True, gate=True) * layers,
        "ffn-out": counts.skinny_linear(rows, ffn, dim, dtype, residual=True) * layers,
        "head": counts.skinny_linear(rows, dim, config.vocab_size, dtype, norm=True),
    }


def step_counts(config: GeneratorConfig, rows: int, position: int, dtype: str) -> dict[str, counts.Counts]:
    """Bytes and operations of each kernel over a whole step at image-token index ``position``."""
    width = counts.ACTIVATION_BYTES[dtype]
    attention = counts.decode_attention(rows, config.n_head, config.n_kv_head, config.head_dim, position, width)
    linear = _linear_counts(config, rows, dtype, config.qkv_dim)
    return {"qkv": linear.pop("qkv"), "attention": attention * config.n_layer, **linear}


def rollout_counts(
    config: GeneratorConfig, images: int, tokens: int, dtype: str, *, guided: bool
) -> dict[str, counts.Counts]:
    """The same over a prefill, ``tokens`` - 1 steps and ``tokens`` draws."""
    rows = images * (2 if guided else 1)
    draw = counts.sample_tokens(images, config.vocab_size, guided=guided)
    parts = [step_counts(config, rows, position, dtype) for position in range(tokens - 1)]  # first: their order is kept
    parts += [_linear_counts(config, rows, dtype, config.kv_dim), {"sample_tokens": draw * tokens}]
    total: dict[str, counts.Counts] = {}
    for part in parts:
        for name, counted in part.items():
            total[name] = total.get(name, counts.Counts(0, 0)) + counted
    return total


def breakdown(
    engine: Engine, expected: dict[str, counts.Counts], run: Callable[[GeneratorOps], Callable[[int], Any]]
) -> Callable[[], list[dict[str, Any]]]:
    """A function that measures the parts of a piece of work.

    Args:
        expected: kernel -> bytes and operations over the whole work; in the order of the parts.
        run: takes ops and returns the call that does the work with those.
    """

    def on_cpu() -> list[dict[str, Any]]:
        runs: list[tuple[float, _Clock]] = []
        spent = 0.0
        while len(runs) < 2 or (len(runs) < _RUNS + 1 and spent < _SECONDS):
            clock = _Clock()
            call = run(_timed_ops(engine, clock))
            start = time.perf_counter()
            call(0)
            runs.append((time.perf_counter() - start, clock))
            spent += runs[-1][0]
        runs = runs[1:]
        parts = []
        for name, counted in expected.items():
            seconds = float(np.median([clock.seconds.get(name, 0.0) for _, clock in runs]))
            calls = runs[0][1].calls.get(name, 0)
            parts.append({"name": name, "seconds": seconds, "calls": calls, "bytes": counted.bytes, "ops": counted.ops})
        gap = float(np.median([max(0.0, total - sum(clock.seconds.values())) for total, clock in runs]))
        return [*parts, _gap(gap)]

    def on_gpu() -> list[dict[str, Any]]:
        call = run(engine.ops)
        return _profiled(lambda: call(0), engine.device)

    return on_gpu if engine.device.type == "cuda" else on_cpu


def _timed_ops(engine: Engine, clock: _Clock) -> GeneratorOps:
    """The engine's ops with a clock around each; whole steps in one call are left out, so that they come apart."""
    ops = engine.ops
    return dataclasses.replace(
        ops,
        skinny_linear=clock.timed(_layer_name(engine), ops.skinny_linear),
        decode_attention=clock.timed(lambda *args, **kwargs: "attention", ops.decode_attention),
        sample_tokens=clock.timed(lambda *args, **kwargs: "sample_tokens", ops.sample_tokens),
        decode_step=None,
        decode_steps=None,
    )


def _gap(seconds: float) -> dict[str, Any]:
    return {"name": GAP, "seconds": seconds, "calls": 0, "bytes": None, "ops": None}


def _profiled(call: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Device time per kernel name over up to ``_RUNS`` calls, and the gap to the time between two device events.

    Not run on hardware yet.
    """
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(runs: int) -> float:
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(runs):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000 / runs

    runs = max(1, min(_RUNS, int(_SECONDS / max(timed(1), 1e-6))))
    total = timed(runs)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            call()
        torch.cuda.synchronize(device)
    parts = []
    for event in sorted(profiler.key_averages(), key=lambda each: -each.self_device_time_total):
        seconds = event.self_device_time_total / 1e6 / runs
        if seconds > 0:
            parts.append(
                {"name": event.key[:80], "seconds": seconds, "calls": event.count / runs, "bytes": None, "ops": None}
            )
    return [*parts, _gap(max(0.0, total - sum(part["seconds"] for part in parts)))]
