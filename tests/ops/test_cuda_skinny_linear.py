"""The CUDA kernels of skinny_linear, emulated on the CPU, against the reference; a row's bits in every bucket."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gear_engine.errors import ConfigError
from gear_engine.ops import GeneratorOps, native
from gear_engine.ops import skinny_linear as op
from tests.ops.test_skinny_linear import TOLERANCE

Emulated = Callable[[str], Callable[..., Any]]


def noise(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "inner", "outer"), [(2, 72, 20), (17, 100, 37)])
def test_matches_the_reference(emulated: Emulated, dtype: torch.dtype, rows: int, inner: int, outer: int) -> None:
    x, residual = noise(dtype, rows, 2 * inner)[:, ::2], noise(dtype, rows, outer)
    weight, gate = (noise(dtype, outer, inner, scale=inner**-0.5) for _ in range(2))
    parts = {"norm_weight": 1 + noise(dtype, inner, scale=0.1), "gate": gate, "residual": residual}
    out = emulated("skinny_linear")(x, weight, **parts)
    expected = op.reference(x.double(), weight.double(), **{name: part.double() for name, part in parts.items()})
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize(("dtype", "inner"), [(torch.bfloat16, 136), (torch.float32, 72)])
def test_a_row_has_the_same_bits_in_every_bucket(emulated: Emulated, dtype: torch.dtype, inner: int) -> None:
    """Up to 256 rows: blocks of one row of blocks, and of several. Started early or not."""
    x, weight, norm = noise(dtype, 256, inner), noise(dtype, 16, inner), noise(dtype, inner)
    run = emulated("skinny_linear")
    rows = run(x, weight, norm_weight=norm)
    expected = op.reference(x.double(), weight.double(), norm_weight=norm.double())
    assert (rows.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    for start, count in ((0, 1), (5, 3), (20, 8), (40, 17), (3, 65), (126, 130)):
        some = run(x[start : start + count], weight, norm_weight=norm, overlap=count in (3, 17, 65))
        assert torch.equal(some, rows[start : start + count]), count


def test_fp32_results_of_narrow_operands_are_not_rounded(emulated: Emulated) -> None:
    x, weight = noise(torch.float16, 1, 40), noise(torch.float16, 16, 40)
    out = emulated("skinny_linear")(x, weight, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    assert not torch.equal(out, out.half().float())


def test_an_engine_takes_logits_that_were_never_rounded(emulated: Emulated) -> None:
    """The head of a model in bf16; other backends widen what was rounded to bf16."""
    x, weight, norm = noise(torch.bfloat16, 3, 40), noise(torch.bfloat16, 24, 40), noise(torch.bfloat16, 40)
    parts = {"norm_weight": norm, "norm_eps": 1e-5}
    ops = GeneratorOps.resolve(torch.device("cpu"), torch.bfloat16, "reference")
    rounded = ops.logits(x, weight, **parts)
    assert torch.equal(rounded, op.reference(x, weight, **parts).float())
    run = functools.partial(emulated("skinny_linear"), overlap=True)
    by_cuda = dataclasses.replace(ops, skinny_linear=run, backends={**ops.backends, "skinny_linear": "cuda"})
    logits = by_cuda.logits(x, weight, **parts)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert torch.allclose(logits, rounded, rtol=1e-2, atol=1e-2)


def test_an_engine_lets_the_kernels_fetch_weights_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda symbol: None)
    chosen = GeneratorOps.resolve(torch.device("cuda"), torch.bfloat16).skinny_linear
    assert isinstance(chosen, functools.partial)
    assert chosen.keywords == {"overlap": True}


def test_weights_that_the_kernels_cannot_read(emulated: Emulated) -> None:
    x, weight = noise(torch.bfloat16, 1, 64), noise(torch.bfloat16, 16, 64)
    with pytest.raises(ConfigError, match="packed"):
        emulated("skinny_linear")(x, op.pack(weight, "int8"))
    with pytest.raises(ConfigError, match="packed"):
        emulated("skinny_linear")(x, weight, gate=op.pack(weight, "bf16"))
    with pytest.raises(ValueError, match="contiguous"):
        emulated("skinny_linear")(x, noise(torch.bfloat16, 64, 16).t())
