"""The rollout benchmark on a tiny generator: its rows, and that its error measures vanish where they must."""

from __future__ import annotations

import pytest
import torch

from gear_engine.bench.inputs import generator_weights
from gear_engine.bench.rollout import Case, rows_of
from gear_engine.config import GeneratorConfig
from gear_engine.ops import native

CONFIG = GeneratorConfig(dim=64, n_layer=2, n_head=2, vocab_size=97, block_size=16, num_classes=5)


@pytest.mark.skipif(native.unavailable("decode_step_cpu") is not None, reason="needs the compiled module")
def test_rows_hold_every_format_and_its_error() -> None:
    weights = generator_weights(CONFIG, 0, torch.device("cpu"))
    before = native.module().decode_step_cpu
    rows, checks = rows_of(Case.build(weights, 3, 8, 0, None), 2, 0, 1e10)
    assert native.module().decode_step_cpu is before
    assert checks == {"images": 3}
    by_name = {row["what"]: row for row in rows}
    assert list(by_name) == ["gear_engine fp32", "gear_engine bf16", "gear_engine int8"]
    assert by_name["gear_engine fp32"]["kl"] == 0
    assert by_name["gear_engine fp32"]["equal_tokens_%"] == 100
    assert 0 < by_name["gear_engine bf16"]["kl"] < by_name["gear_engine int8"]["kl"] < 0.5
    for row in rows:
        assert row["runs"] == 2
        assert 0 < row["best_ms"] <= row["median_ms"]
        assert row["of_read_%"] > 0
        assert 0 < row["outside_%"] < 100
