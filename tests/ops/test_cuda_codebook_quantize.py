"""The CUDA kernel of codebook_quantize, emulated on the CPU, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gear_engine.ops import codebook_quantize


@pytest.mark.parametrize("metric", ["l2", "l2_normalized", "inner_product"])
@pytest.mark.parametrize(("rows", "codes", "width"), [(1, 1, 1), (9, 257, 8), (3, 70, 14)])
def test_matches_the_reference(
    emulated: Callable[[str], Callable[..., Any]], metric: codebook_quantize.Metric, rows: int, codes: int, width: int
) -> None:
    z, codebook = torch.randn(rows, width), torch.randn(codes, width)
    indices, quantized = emulated("codebook_quantize")(z, codebook, metric)
    expected_indices, expected = codebook_quantize.reference(z, codebook, metric)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(quantized, expected)
