"""What low precision costs the shipped model, which is trained: formats stay as near to fp32 as the docs say."""

from __future__ import annotations

from gear_engine.bench.precision import errors
from gear_engine.checkpoint import load_generator
from gear_engine.pretrained import SHAPES


def test_formats_stay_near_fp32() -> None:
    rows = {row["format"]: row for row in errors(load_generator(SHAPES), images=16, cfg_scale=2.0, seed=1)}
    assert rows["fp32"]["kl"] == 0 and rows["fp32"]["equal_tokens_%"] == 100
    assert 0 < rows["bf16"]["kl"] < 2e-3 and rows["bf16"]["equal_tokens_%"] > 98
    assert rows["bf16"]["kl"] < rows["int8"]["kl"] < 1e-2 and rows["int8"]["equal_tokens_%"] > 95
