"""sign_bits: indices and signs of every backend are those of the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gear_engine.ops.sign_bits import reference, sign_bits


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 3000),
    groups=st.integers(1, 5),
    width=st.integers(1, 33),
    strided=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_matches_the_reference(n: int, groups: int, width: int, strided: bool, seed: int, isa: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (groups * width, n) if strided else (n, groups * width)
    z = torch.randint(-2, 3, shape, generator=generator).float()  # many zeros
    z = z.t() if strided else z
    indices, quantized = sign_bits(z, groups, backend="cpu")
    expected = reference(z, groups)
    assert torch.equal(indices, expected[0])
    assert torch.equal(quantized, expected[1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bit_i_is_channel_i_and_zero_is_negative(backend: str, isa: str) -> None:
    z = torch.tensor([[1.0, -1.0, 2.0, 0.0], [-0.0, 3.0, torch.nan, torch.inf]])
    indices, quantized = sign_bits(z, 2, backend=backend)
    assert indices.tolist() == [[1, 1], [2, 2]]
    assert quantized.tolist() == [[1, -1, 1, -1], [-1, 1, -1, 1]]


def test_strided_input(isa: str) -> None:
    z = torch.randn(14, 50).t()[::3]
    for got, expected in zip(sign_bits(z, 1, backend="cpu"), reference(z, 1), strict=True):
        assert torch.equal(got, expected)


def test_the_widest_groups(isa: str) -> None:
    indices, _ = sign_bits(torch.ones(1, 124), 2, backend="cpu")
    assert indices.tolist() == [[2**62 - 1] * 2]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="groups"):
        sign_bits(torch.randn(3, 10), 4)
    with pytest.raises(ValueError, match="62 bits"):
        sign_bits(torch.randn(3, 63))
    with pytest.raises(ValueError, match="cannot be cut"):
        sign_bits(torch.randn(3), 1)
