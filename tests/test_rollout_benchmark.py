"""The rollout benchmark on a tiny generator: its rows, and that its error measures vanish where they must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from gear_engine.bench import counts
from gear_engine.bench.inputs import generator_weights
from gear_engine.bench.rollout import Case, rows_of
from gear_engine.bench.step_costs import share_outside, step_ops
from gear_engine.bench.timing import Ceilings
from gear_engine.config import GeneratorConfig
from gear_engine.ops import native

CONFIG = GeneratorConfig(dim=64, n_layer=2, n_head=2, vocab_size=97, block_size=16, num_classes=5)
CEILINGS = Ceilings(1e10, {"float32": 2e10, "bfloat16": 1e10, "int8": 4e10})


needs_native = pytest.mark.skipif(native.unavailable("decode_step_cpu") is not None, reason="needs the compiled module")


@needs_native
def test_rows_hold_every_format_and_its_error() -> None:
    weights = generator_weights(CONFIG, 0, torch.device("cpu"))
    before = native.module().decode_step_cpu
    rows, checks = rows_of(Case.build(weights, 3, 8, 0, None), 2, 0, CEILINGS)
    assert native.module().decode_step_cpu is before
    assert checks["images"] == 3
    assert set(checks["prepare_s"]) == {"fp32", "bf16", "int8"}
    by_name = {row["what"]: row for row in rows}
    assert list(by_name) == ["gear_engine fp32", "gear_engine bf16", "gear_engine int8"]
    assert by_name["gear_engine fp32"]["kl"] == 0
    assert by_name["gear_engine fp32"]["equal_tokens_%"] == 100
    assert 0 < by_name["gear_engine bf16"]["kl"] < by_name["gear_engine int8"]["kl"] < 0.5
    for row in rows:
        assert row["runs"] == 2
        assert 0 < row["best_ms"] <= row["median_ms"]
        assert row["of_read_%"] > 0
        assert 0 < row["outside_torch_%"] < 100
        assert 0 < row["outside_philox_%"] < 100
    ops = step_ops(CONFIG, 3, 8)
    for name, rate in (("fp32", 2e10), ("bf16", 2e10), ("int8", 4e10)):
        row = by_name[f"gear_engine {name}"]
        assert row["of_rate_%"] == pytest.approx(100 * ops / rate / (row["best_ms"] / 1e3))


def test_products_are_nearly_all_that_a_step_counts() -> None:
    config = GeneratorConfig(dim=768, n_layer=3, n_head=12, n_kv_head=4, vocab_size=4096, block_size=256, num_classes=9)
    counted = sum(counts.decode_step(config, 16, position, "fp32").ops for position in range(256)) / 256
    assert 0.97 < step_ops(config, 8, 256) / counted < 1


def _counting(calls: Counter[str], name: str, function: Callable[..., object]) -> Callable[..., object]:
    def call(*arguments: object) -> object:
        calls[name] += 1
        return function(*arguments)

    return call


@needs_native
def test_either_source_of_draws_takes_one_call_for_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = generator_weights(CONFIG, 0, torch.device("cpu"))
    case = Case.build(weights, 2, 8, 0, None)
    for rng in ("torch", "philox"):
        calls: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            for name in ("decode_step_cpu", "decode_steps_cpu"):
                function = getattr(native.module(), name)
                patch.setattr(native.module(), name, _counting(calls, name, function))
            share_outside(case.engines["fp32"], case.labels, 8, rng)  # type: ignore[arg-type]
        assert calls["decode_step_cpu"] == 0
        assert 0 < calls["decode_steps_cpu"] < 7
