"""group_norm_silu against its reference and against torch's own GroupNorm and SiLU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gear_engine.ops import native
from gear_engine.ops.group_norm_silu import group_norm_silu
from gear_engine.ops.residual_moments import residual_moments
from tests.golden_weights import relative_error
from tests.ops.cpu_paths import threads

needs_native = pytest.mark.skipif(native.unavailable("group_norm_silu_cpu") is not None, reason="not compiled")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
SHAPES = [(1, 2, 32, 32), (3, 5, 48, 3), (2, 67, 112, 7), (4, 65, 128, 32)]


def _moments(x: torch.Tensor, groups: int) -> torch.Tensor:
    moments = torch.empty(x.shape[0], groups, 2, dtype=torch.float64)
    residual_moments(x, None, moments, backend="reference")
    return moments


def _torch(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    y = F.group_norm(x.double().permute(2, 0, 1)[None], groups, eps=1e-6)[0].permute(1, 2, 0)
    y = y if weight is None or bias is None else y * weight + bias
    return F.silu(y) if silu else y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("height", "width", "channels", "groups"), SHAPES)
def test_equals_torch(
    backend: str, silu: bool, affine: bool, height: int, width: int, channels: int, groups: int
) -> None:
    x = torch.randn(height, width, channels) * 3 + 10
    weight, bias = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
    out = torch.empty_like(x)
    group_norm_silu(x, _moments(x, groups), weight, bias, out, silu=silu, backend=backend)
    assert relative_error(out, _torch(x, groups, weight, bias, silu)) <= 5e-6


@needs_native
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_and_dtype(isa: str, x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    x = (torch.randn(3, 21, 96) * 20).to(x_dtype)
    weight, bias = torch.randn(96), torch.randn(96)
    moments = _moments(x, 32)
    out, expected = torch.empty(3, 21, 96, dtype=y_dtype), torch.empty(3, 21, 96)
    group_norm_silu(x, moments, weight, bias, out, backend="cpu")
    group_norm_silu(x, moments, weight, bias, expected, backend="reference")
    if y_dtype == torch.float32:
        assert relative_error(out, expected) <= 1e-6
    else:
        # Rounded from values that differ by less than 2^-13: at most one bf16 step apart, and rarely.
        torch.testing.assert_close(out.float(), expected.bfloat16().float(), rtol=2**-7, atol=1e-6)
        assert (out == expected.bfloat16()).float().mean() > 0.97


@needs_native
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 70),
    groups=st.sampled_from([1, 2, 3, 7, 8, 32]),
    sixteens=st.integers(1, 3),
    affine=st.booleans(),
    silu=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_compiled_equals_reference_on_odd_shapes(
    height: int, width: int, groups: int, sixteens: int, affine: bool, silu: bool, half: bool, seed: int, isa: str
) -> None:
    channels, generator = math.lcm(16, groups) * sixteens, torch.Generator().manual_seed(seed)
    x = torch.randn(height, width, channels, generator=generator) * 3 + 1
    x = x.bfloat16() if half else x
    weight, bias = torch.randn(2, channels, generator=generator) if affine else (None, None)
    moments, out, expected = _moments(x, groups), torch.full(x.shape, torch.nan), torch.empty(x.shape)
    group_norm_silu(x, moments, weight, bias, out, silu=silu, backend="cpu")
    group_norm_silu(x, moments, weight, bias, expected, silu=silu, backend="reference")
    # x * scale + shift: in a group of equal numbers both are a thousand times x, and nearly nothing is left of them.
    scale = (x.double().unflatten(2, (groups, -1)).var(dim=(0, 1, 3), unbiased=False) + 1e-6).rsqrt().max()
    largest = x.abs().max() * scale * (1 if weight is None else weight.abs().max())
    assert float((out - expected).abs().max()) <= 5e-7 * float(largest) + 1e-6 * float(expected.abs().max())


@needs_native
def test_extremes_stay_finite_and_nan_stays_nan(isa: str) -> None:
    x = torch.tensor([-300.0, -88.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 3e38] * 4).view(1, 1, 32)
    moments = torch.zeros(1, 1, 2, dtype=torch.float64)
    moments[..., 1] = 32.0  # mean 0, variance 1: the norm is the identity
    out = torch.empty_like(x)
    group_norm_silu(x, moments, None, None, out, eps=1e-12, backend="cpu")
    torch.testing.assert_close(out, F.silu(x), rtol=1e-5, atol=1e-30)
    half = torch.empty(1, 1, 32, dtype=torch.bfloat16)
    x[0, 0, 5] = float("nan")
    group_norm_silu(x, moments, None, None, half, eps=1e-12, silu=False, backend="cpu")
    assert half.isnan().flatten().tolist() == [i == 5 for i in range(32)]


@needs_native
@pytest.mark.parametrize("count", [1, 2, 5])
def test_strips_in_place_and_threads_keep_the_bits(count: int, isa: str) -> None:
    x = torch.randn(9, 70, 64)
    moments = _moments(x, 32)
    whole = torch.empty_like(x)
    with threads(3):
        group_norm_silu(x, moments, None, None, whole, backend="cpu")
    with threads(count):
        strips = x.clone()
        group_norm_silu(strips[:4], moments, None, None, strips[:4], backend="cpu")
        group_norm_silu(strips[4:], moments, None, None, strips[4:], backend="cpu")
    assert torch.equal(strips, whole)


def test_bad_operands_are_refused() -> None:
    x = torch.zeros(2, 4, 32)
    moments = torch.zeros(2, 8, 2, dtype=torch.float64)
    weight = torch.zeros(32)
    for arguments in (
        (x[0], moments, None, None, x[0]),
        (x, moments.float(), None, None, x),
        (x, moments[:, :5], None, None, x),
        (x, moments, weight[:8], None, x),
        (x, moments, weight.double(), None, x),
        (x, moments, None, None, x[:1]),
        (x, moments, None, None, x.half()),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            group_norm_silu(*arguments)
