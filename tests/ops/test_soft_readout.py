"""soft_readout: every instruction set agrees with the formula in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.ops import native
from gear_engine.ops.soft_readout import reference, soft_readout
from tests.golden_weights import relative_error

DISTANCES = ("l2", "l2_normalized", "inner_product", "lfq")
LEVELS = ("portable", "avx2", "avx512")


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(0, 120),
    k=st.integers(1, 300),
    d=st.integers(1, 20),
    c=st.one_of(st.integers(1, 70), st.sampled_from([100, 384])),
    tau=st.sampled_from([0.01, 0.3, 5.0]),
    distance=st.sampled_from(DISTANCES),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 10**6),
)
def test_matches_double_precision(
    n: int, k: int, d: int, c: int, tau: float, distance: str, level: str, seed: int
) -> None:
    module = native.module()
    if LEVELS.index(level) > LEVELS.index(module.best_cpu_isa()):
        return
    generator = torch.Generator().manual_seed(seed)
    z, codebook, table = (torch.randn(*shape, generator=generator) for shape in ((n, d), (k, d), (k, c)))
    before = module.cpu_isa()
    module.set_cpu_isa(level)
    try:
        out = soft_readout(z, codebook, table, tau, distance, backend="cpu")  # type: ignore[arg-type]
    finally:
        module.set_cpu_isa(before)
    expected = reference(z.double(), codebook.double(), table.double(), tau, distance)  # type: ignore[arg-type]
    assert out.shape == (n, c)
    if n:
        # Rounding of the logits is divided by tau: at 0.01 a logit of 5000 carries 3e-4.
        assert relative_error(out, expected) <= max(1e-4, 2e-5 / tau)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_large_codebook_with_a_sharp_softmax(distance: str) -> None:
    z, codebook, table = torch.randn(33, 8), torch.randn(5000, 8), torch.randn(5000, 40)
    out = soft_readout(z, codebook, table, 0.3, distance, backend="cpu")  # type: ignore[arg-type]
    expected = reference(z.double(), codebook.double(), table.double(), 0.3, distance)  # type: ignore[arg-type]
    assert relative_error(out, expected) <= 1e-4


def test_a_row_does_not_depend_on_the_others_or_on_threads() -> None:
    z, codebook, table = torch.randn(100, 8), torch.randn(300, 8), torch.randn(300, 50)
    whole = soft_readout(z, codebook, table, 0.3, "l2", backend="cpu")
    for rows in ([0], [97, 98, 99], list(range(17, 34))):
        assert torch.equal(soft_readout(z[rows], codebook, table, 0.3, "l2", backend="cpu"), whole[rows])
    native.module().set_num_threads(5)
    again = soft_readout(z, codebook, table, 0.3, "l2", backend="cpu")
    native.module().set_num_threads(torch.get_num_threads())
    assert torch.equal(again, whole)


def test_far_codes_have_no_weight_and_nothing_overflows() -> None:
    codebook = torch.tensor([[0.0], [1e4], [-1e4]])
    out = soft_readout(torch.tensor([[1.0], [1e4]]), codebook, torch.eye(3), 1.0, "l2", backend="cpu")
    assert torch.equal(out, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


def test_bad_arguments() -> None:
    z, codebook, table = torch.randn(4, 8), torch.randn(16, 8), torch.randn(16, 5)
    with pytest.raises(ValueError, match="tau"):
        soft_readout(z, codebook, table, 0.0, "l2")
    with pytest.raises(ValueError, match="distance"):
        soft_readout(z, codebook, table, 1.0, "cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="table"):
        soft_readout(z, codebook, table[:3], 1.0, "l2")
    with pytest.raises(ValueError, match="no gradient"):
        soft_readout(z.requires_grad_(), codebook, table, 1.0, "l2", backend="cpu")
