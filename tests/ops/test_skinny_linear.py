"""The fused linear layer against its parts in double precision, and packing there and back."""

from __future__ import annotations

import pytest
import torch

from gear_engine.ops import skinny_linear as op

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def _expected(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    wide = x.double()
    if norm is not None:
        wide = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(x.dtype).double() * norm.double()
    y = wide @ weight.double().T
    if gate is not None:
        y = y * y.sigmoid() * (wide @ gate.double().T)
    return y if residual is None else residual.double() + y


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 8, 4), (2, 72, 200), (3, 100, 37), (16, 64, 129)])
@pytest.mark.parametrize("parts", ["", "norm", "gate", "residual", "norm gate residual"])
def test_matches_double_precision(dtype: torch.dtype, rows: int, inner: int, outer: int, parts: str) -> None:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    x, weight = noise(rows, inner), noise(outer, inner) / inner**0.5
    norm = 1 + 0.1 * noise(inner) if "norm" in parts else None
    gate = noise(outer, inner) / inner**0.5 if "gate" in parts else None
    residual = noise(rows, outer) if "residual" in parts else None
    out = op.skinny_linear(x, weight, norm_weight=norm, gate=gate, residual=residual, backend="reference")
    expected = _expected(x, weight, norm, gate, residual)
    assert out.dtype == dtype
    assert out.shape == (rows, outer)
    assert (out.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_strided_input() -> None:
    x, weight = torch.randn(3, 20)[:, ::2], torch.randn(5, 10)
    assert torch.allclose(op.reference(x, weight), x.contiguous() @ weight.T, atol=1e-6)


@pytest.mark.parametrize(("outer", "inner"), [(16, 32), (37, 100), (1, 3), (129, 72)])
def test_bf16_packing_keeps_every_number(outer: int, inner: int) -> None:
    weight = torch.randn(outer, inner).to(torch.bfloat16)
    packed = op.pack(weight, "bf16")
    assert packed.nbytes == op.packed_nbytes(outer, inner, "bf16")
    assert (packed.out_features, packed.in_features) == (outer, inner)
    assert torch.equal(op.unpack(packed, torch.bfloat16), weight)
    x = torch.randn(2, inner).to(torch.bfloat16)
    assert torch.equal(op.reference(x, packed), op.reference(x, weight))


def test_int8_packing_rounds_to_the_nearest_step_of_each_row() -> None:
    weight = torch.randn(37, 100) * torch.logspace(-3, 2, 37)[:, None]
    weight[5] = 0
    packed = op.pack(weight, "int8")
    assert packed.scales is not None
    step = weight.abs().amax(1) / 127
    assert torch.allclose(packed.scales, step)
    assert ((op.unpack(packed) - weight).abs() <= 0.5 * step[:, None] * (1 + 1e-5)).all()
    assert (op.unpack(packed)[5] == 0).all()
    assert packed.nbytes == op.packed_nbytes(37, 100, "int8")


def test_bad_operands() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    for message, operands in {
        "does not fit": {"x": torch.randn(2, 7)},
        "gate": {"gate": torch.randn(5, 8)},
        "norm_weight": {"norm_weight": torch.ones(7)},
        "residual": {"residual": torch.randn(2, 5)},
        "weight is": {"weight": weight.bfloat16()},
    }.items():
        with pytest.raises(ValueError, match=message):
            op.skinny_linear(**{"x": x, "weight": weight, "backend": "reference", **operands})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int3"):
        op.pack(weight, "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrix"):
        op.pack(weight[0], "bf16")
