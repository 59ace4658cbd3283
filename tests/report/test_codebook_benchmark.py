"""The benchmark's comparison of indices finds a wrong one and says how far it is from a tie."""

from __future__ import annotations

import pytest
import torch

from gear_engine.bench import codebook_quantize as bench
from gear_engine.bench import quantize_memory
from gear_engine.bench.registry import Context, select
from gear_engine.ops import native
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


@pytest.mark.skipif(native.unavailable("codebook_quantize_cpu") is not None, reason="needs the compiled module")
def test_the_compiled_op_makes_no_matrix_of_vectors_and_codes() -> None:
    found = quantize_memory.measure("cpu", ("l2", "l2_normalized", "inner_product"), 20000, 16384, 8)
    assert found["matrix"] == 4 * 20000 * 16384
    assert found["peak"] < found["matrix"] / 20  # 4 MB of 1.3 GB on two threads


def test_a_matrix_of_vectors_and_codes_is_seen() -> None:
    found = quantize_memory.measure("reference", ("l2",), 500, 16384, 8)
    assert found["peak"] > found["matrix"]


@pytest.mark.parametrize("metric", ["l2", "l2_normalized", "inner_product"])
@pytest.mark.parametrize("width", [8, 256])
def test_a_wrong_index_fails_in_the_suite_at_any_width(metric: str, width: int) -> None:
    grid = {"metric": [metric], "width": [str(width)], "vectors": ["64"], "codes": ["200"]}
    (case,) = select(["codebook_quantize"], "quick", grid, "")
    work = case.benchmark.prepare(case.params, Context(torch.device("cpu")))
    assert work.check is not None
    expected = work.check.reference(0)
    for each in work.implementations:
        assert work.check.error(each.call(0), expected) <= work.check.bound
    wrong = expected.clone()
    wrong[5] = (wrong[5] + 1) % 200
    assert work.check.error(wrong, expected) > work.check.bound
