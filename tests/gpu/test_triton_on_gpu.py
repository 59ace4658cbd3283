"""What Triton compiles: one binary of a linear layer for every number of rows."""

from __future__ import annotations

import pytest
import torch

from gear_engine.ops import skinny_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the interpreter compiles nothing"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_binary_for_every_number_of_rows(dtype: torch.dtype) -> None:
    from gear_engine.triton_kernels import skinny_linear as kernels

    x, weight = torch.randn(64, 48, device="cuda").to(dtype), torch.randn(32, 48, device="cuda").to(dtype)
    counts = []
    for rows in (2, 1, 16, 17, 64):
        skinny_linear.skinny_linear(x[:rows], weight, backend="triton")
        counts.append(len(kernels._skinny_linear_kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts == counts[:1] * 5
