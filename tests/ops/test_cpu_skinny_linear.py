"""The compiled linear layer: against double precision on odd shapes, and equal bits in any batch on any threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.ops import skinny_linear as op
from tests.ops.cpu_paths import PATHS, forced, threads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ("plain", "bf16", "int8")


def _operands(
    rows: int, inner: int, outer: int, dtype: torch.dtype, kind: str, parts: str, seed: int = 0
) -> tuple[torch.Tensor, op.Weight, dict[str, Any]]:
    rng = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    def weight() -> op.Weight:
        matrix = noise(outer, inner) / inner**0.5
        return matrix if kind == "plain" else op.pack(matrix, kind)  # type: ignore[arg-type]

    extra: dict[str, Any] = {}
    if "norm" in parts:
        extra["norm_weight"] = 1 + 0.1 * noise(inner)
    if "gate" in parts:
        extra["gate"] = weight()
    if "residual" in parts:
        extra["residual"] = noise(rows, outer)
    return noise(rows, inner), weight(), extra


def _expected(x: torch.Tensor, weight: op.Weight, kind: str, extra: dict[str, Any]) -> torch.Tensor:
    """The op in double precision, on operands rounded as the kernels round them."""
    wide = x
    if "norm_weight" in extra:
        wide = op.rms_norm(x, extra["norm_weight"])
    if kind == "bf16":
        wide = wide.to(torch.bfloat16)
    if kind == "int8":
        scale = wide.float().abs().amax(1, keepdim=True) / 127
        wide = (wide.float() / scale.where(scale > 0, torch.ones(()))).round().double() * scale.double()

    def product(matrix: op.Weight) -> torch.Tensor:
        full = op.unpack(matrix) if isinstance(matrix, op.PackedWeight) else matrix
        return wide.double() @ full.double().T

    y = product(weight)
    if "gate" in extra:
        y = y * y.sigmoid() * product(extra["gate"])
    return extra["residual"].double() + y if "residual" in extra else y


@settings(max_examples=80, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 20), st.sampled_from([33, 64, 65])),
    inner=st.one_of(st.integers(1, 140), st.sampled_from([255, 256, 768])),
    outer=st.one_of(st.integers(1, 140), st.sampled_from([255, 256])),
    dtype=st.sampled_from(sorted(DTYPES)),
    kind=st.sampled_from(KINDS),
    parts=st.sampled_from(["", "norm", "gate", "residual", "norm gate", "norm gate residual"]),
    path=st.sampled_from(sorted(PATHS)),
    seed=st.integers(0, 10**6),
)
def test_matches_double_precision(
    rows: int, inner: int, outer: int, dtype: str, kind: str, parts: str, path: str, seed: int
) -> None:
    x, weight, extra = _operands(rows, inner, outer, DTYPES[dtype], kind, parts, seed)
    with forced(path):
        out = op.skinny_linear(x, weight, **extra, backend="cpu")
    expected = _expected(x, weight, kind, extra)
    assert out.dtype == x.dtype
    # A number that lies between two roundings may go either way: half a step of one operand of the sum.
    step = {"plain": 3e-6, "bf16": 2.0**-8 if "norm" in parts else 3e-6, "int8": 2e-2}[kind]
    step = max(step, 2.0**-7 if dtype == "bfloat16" else 0.0)
    assert (out.double() - expected).abs().max() <= step * max(float(expected.abs().max()), 1e-2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_bits_do_not_depend_on_batch_or_threads(path: str, kind: str, dtype: str) -> None:
    x, weight, extra = _operands(64, 200, 151, DTYPES[dtype], kind, "norm gate residual")
    residual = extra.pop("residual")
    with forced(path):
        with threads(1):
            alone = torch.cat(
                [
                    op.skinny_linear(x[i : i + 1], weight, **extra, residual=residual[i : i + 1], backend="cpu")
                    for i in range(x.shape[0])
                ]
            )
        for count in (1, 2, 5):
            with threads(count):
                for rows in (2, 3, 7, 8, 13, 15, 16, 17, 64):
                    order = torch.randperm(64)[:rows]
                    out = op.skinny_linear(x[order], weight, **extra, residual=residual[order], backend="cpu")
                    assert torch.equal(out, alone[order])


@pytest.mark.parametrize("path", PATHS)
def test_int8_sums_are_exact_at_the_extremes(path: str) -> None:
    # Products of +-127 summed over a long row: 16-bit intermediate sums would saturate.
    x = torch.full((3, 1000), -5.0)
    weight = op.pack(torch.full((20, 1000), 0.5), "int8")
    with forced(path):
        out = op.skinny_linear(x, weight, backend="cpu")
    assert torch.allclose(out, torch.full((3, 20), -2500.0), rtol=1e-6)


def test_a_row_of_zeros_stays_zero() -> None:
    for kind in KINDS:
        _, weight, _ = _operands(1, 70, 30, torch.float32, kind, "")
        assert torch.equal(op.skinny_linear(torch.zeros(2, 70), weight, backend="cpu"), torch.zeros(2, 30))


def test_strided_rows_are_read_right() -> None:
    x, weight = torch.randn(3, 40)[:, ::2], torch.randn(5, 20)
    assert torch.allclose(op.skinny_linear(x, weight, backend="cpu"), x @ weight.T, atol=1e-5)


def test_weights_must_be_alike_and_contiguous() -> None:
    weight = torch.randn(8, 16)
    with pytest.raises(ValueError, match="packed alike"):
        op.skinny_linear(torch.randn(1, 16), weight, gate=op.pack(weight, "int8"), backend="cpu")
    with pytest.raises(ValueError, match="contiguous"):
        op.skinny_linear(torch.randn(1, 8), weight.T, backend="cpu")
