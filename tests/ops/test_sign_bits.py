"""sign_bits: indices and signs of every backend are those of the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.ops.sign_bits import reference, sign_bits


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 3000), groups=st.integers(1, 5), width=st.integers(1, 33), seed=st.integers(0, 10**6))
def test_matches_the_reference(n: int, groups: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-2, 3, (n, groups * width), generator=generator).float()  # many zeros
    indices, quantized = sign_bits(z, groups, backend="cpu")
    expected = reference(z, groups)
    assert torch.equal(indices, expected[0])
    assert torch.equal(quantized, expected[1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bit_i_is_channel_i_and_zero_is_negative(backend: str) -> None:
    z = torch.tensor([[1.0, -1.0, 2.0, 0.0], [-0.0, 3.0, torch.nan, torch.inf]])
    indices, quantized = sign_bits(z, 2, backend=backend)
    assert indices.tolist() == [[1, 1], [2, 2]]
    assert quantized.tolist() == [[1, -1, 1, -1], [-1, 1, -1, 1]]


def test_strided_input() -> None:
    z = torch.randn(14, 50).t()[::3]
    for got, expected in zip(sign_bits(z, 1, backend="cpu"), reference(z, 1), strict=True):
        assert torch.equal(got, expected)


def test_the_widest_group() -> None:
    indices, _ = sign_bits(torch.ones(1, 62), backend="cpu")
    assert indices.item() == 2**62 - 1


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="groups"):
        sign_bits(torch.randn(3, 10), 4)
    with pytest.raises(ValueError, match="62 bits"):
        sign_bits(torch.randn(3, 63))
    with pytest.raises(ValueError, match="cannot be cut"):
        sign_bits(torch.randn(3), 1)
