"""residual_moments against its reference, and what it promises about strips and threads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gear_engine.ops import backends, native
from gear_engine.ops.residual_moments import join_phases, reference, residual_moments

needs_native = pytest.mark.skipif(native.unavailable("residual_moments_cpu") is not None, reason="not compiled")
SHAPES = [(1, 1, 32, 32), (3, 5, 48, 3), (2, 130, 112, 7), (4, 65, 128, 32), (6, 2, 16, 1)]


def _source(height: int, width: int, channels: int, phase_offset: int | None, dtype: torch.dtype) -> torch.Tensor:
    if phase_offset is None:
        return (torch.randn(height, width, channels) + 3).to(dtype)
    return (torch.randn(height // 2 + phase_offset, width // 2 + phase_offset, 4, channels) + 3).to(dtype)


def _compare(height: int, width: int, channels: int, groups: int, mode: str, dtype: torch.dtype) -> None:
    """The compiled kernel's residual has the reference's bits, its moments the reference's values."""
    phase_offset = int(mode[-1]) if mode.startswith("phases") else None
    if phase_offset is not None:
        height, width = 2 * height, 2 * width
    source = _source(height, width, channels, phase_offset, dtype)
    results = []
    for run in ("reference", "cpu"):
        torch.manual_seed(3)
        residual = None if mode == "moments" else torch.randn(height, width, channels)
        moments = torch.full((height, groups, 2), float("nan"), dtype=torch.float64)
        residual_moments(
            source, residual, moments, accumulate=mode == "accumulate", phase_offset=phase_offset, backend=run
        )
        results.append((residual, moments))
    (expected, expected_moments), (actual, actual_moments) = results
    if expected is not None and actual is not None:
        assert torch.equal(actual, expected)
    torch.testing.assert_close(actual_moments, expected_moments, rtol=1e-6, atol=1e-4)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width", "channels", "groups"), SHAPES)
@pytest.mark.parametrize("mode", ["moments", "store", "accumulate", "phases0", "phases1"])
def test_compiled_equals_reference(
    isa: str, dtype: torch.dtype, height: int, width: int, channels: int, groups: int, mode: str
) -> None:
    _compare(height, width, channels, groups, mode, dtype)


@needs_native
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 40),
    groups=st.sampled_from([1, 2, 3, 7, 8, 32]),
    sixteens=st.integers(1, 3),
    mode=st.sampled_from(["moments", "store", "accumulate", "phases0", "phases1"]),
    half=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_compiled_equals_reference_on_odd_shapes(
    height: int, width: int, groups: int, sixteens: int, mode: str, half: bool, seed: int, isa: str
) -> None:
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if half else torch.float32
    _compare(height, width, math.lcm(16, groups) * sixteens, groups, mode, dtype)


@needs_native
def test_bits_depend_neither_on_strips_nor_on_threads() -> None:
    source = torch.randn(9, 70, 96)
    whole = torch.empty(9, 32, 2, dtype=torch.float64)
    residual_moments(source, None, whole, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for count, cuts in ((1, (0, 9)), (2, (0, 1, 9)), (5, (0, 4, 5, 9))):
            torch.set_num_threads(count)
            parts = torch.empty_like(whole)
            for first, last in itertools.pairwise(cuts):
                residual_moments(source[first:last], None, parts[first:last], backend="cpu")
            assert torch.equal(parts, whole)
    finally:
        torch.set_num_threads(threads)


def test_phases_are_an_upsampled_convolution() -> None:
    x, weight = torch.randn(1, 5, 4, 6), torch.randn(3, 5, 3, 3)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    taps = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))  # 3 x 3 rows that fall on the two source rows
    phases = torch.empty(2, 2, 3, 5, 2, 2)
    for dy in (0, 1):
        for dx in (0, 1):
            for i in (0, 1):
                for j in (0, 1):
                    phases[dy, dx, :, :, i, j] = weight[:, :, taps[dy][i], taps[dx][j]].sum(dim=(2, 3))
    out = F.conv2d(x, phases.flatten(0, 2), padding=1)  # [1, 4 * 3, H + 1, W + 1]
    joined = join_phases(out[0].permute(1, 2, 0).unflatten(2, (4, 3)), 1)
    torch.testing.assert_close(joined, expected[0].permute(1, 2, 0), atol=1e-5, rtol=1e-5)


def test_phases_with_offset_zero_are_depth_to_space() -> None:
    source = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).float()
    joined = join_phases(source, 0)
    for y in range(4):
        for x in range(6):
            assert torch.equal(joined[y, x], source[y // 2, x // 2, 2 * (y % 2) + x % 2])


def test_bad_operands_are_refused() -> None:
    source, residual = torch.zeros(2, 4, 32), torch.zeros(2, 4, 32)
    moments = torch.zeros(2, 8, 2, dtype=torch.float64)
    for arguments in (
        (source, residual.bfloat16(), moments),
        (source[:, :3], residual, moments),
        (source, residual, moments.float()),
        (source, residual, moments[:1]),
        (source, residual, torch.zeros(2, 5, 2, dtype=torch.float64)),
        (source[0], None, moments),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            residual_moments(*arguments)
    with pytest.raises(ValueError, match="need a residual"):
        residual_moments(source, None, moments, accumulate=True)
    with pytest.raises(ValueError, match="even edges"):
        residual_moments(source, torch.zeros(3, 4, 32), torch.zeros(3, 8, 2, dtype=torch.float64), phase_offset=1)


@needs_native
def test_the_compiled_kernel_says_what_it_cannot_take() -> None:
    run = backends.resolve("residual_moments", torch.device("cpu"), torch.float32, "cpu").load()
    moments = torch.zeros(2, 4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="multiples of 16"):
        run(torch.zeros(2, 4, 12), None, moments)
    with pytest.raises(ValueError, match="contiguous"):
        run(torch.zeros(4, 2, 32).transpose(0, 1), None, moments)
    reference(torch.zeros(2, 4, 12), None, moments)
