"""The CUDA kernel of sign_bits, emulated on the CPU, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gear_engine.ops.sign_bits import reference


@pytest.mark.parametrize(("rows", "width", "groups"), [(0, 8, 1), (300, 14, 1), (67, 32, 4)])
def test_matches_the_reference(
    emulated: Callable[[str], Callable[..., Any]], rows: int, width: int, groups: int
) -> None:
    z = torch.randint(-2, 3, (width, rows)).float().t()  # many zeros; channels first
    for got, expected in zip(emulated("sign_bits")(z, groups), reference(z, groups), strict=True):
        assert torch.equal(got, expected)
