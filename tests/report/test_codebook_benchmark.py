"""The benchmark's comparison of indices finds a wrong one and says how far it is from a tie."""

from __future__ import annotations

import pytest
import torch

from gear_engine.bench import codebook_quantize as bench
from gear_engine.ops.codebook_quantize import Metric


@pytest.mark.parametrize(("metric", "d"), bench.KINDS)
def test_a_wrong_index_is_counted_and_is_no_tie(metric: Metric, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CODES", 64)
    right = bench.codebook_quantize
    assert bench.check(metric, d, 50, None, block=20)["different"] == 0

    def wrong(z: torch.Tensor, codebook: torch.Tensor, kind: Metric) -> tuple[torch.Tensor, torch.Tensor]:
        indices, quantized = right(z, codebook, kind)
        indices[7:8] = (indices[7:8] + 1) % 64
        return indices, quantized

    monkeypatch.setattr(bench, "codebook_quantize", wrong)
    found = bench.check(metric, d, 50, None, block=20)
    assert found["different"] == 3
    assert found["largest_gap"] > 1e-3


def test_a_tie_has_no_gap() -> None:
    z, code = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.5]])
    mirrored = torch.tensor([[0.0, 2.5]])  # as far from z
    assert bench.tie_gap("l2", z, code, mirrored) == 0
    assert bench.tie_gap("inner_product", z, code, mirrored) == 0
    assert bench.tie_gap("l2", z, code, code + 1) > 0.1
