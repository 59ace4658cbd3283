"""conv_rows against a float64 convolution, and what it promises about strips, threads and bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gear_engine.ops import native
from gear_engine.ops.conv_rows import conv_rows, pack
from tests.golden_weights import relative_error

pytestmark = pytest.mark.skipif(native.unavailable("conv_rows_cpu") is not None, reason="not compiled")
#: rows, width, in, out, edge, padding
SHAPES = [
    (1, 1, 1, 1, 3, 1),
    (2, 7, 20, 70, 3, 1),
    (3, 13, 33, 3, 3, 2),
    (2, 6, 16, 64, 2, 1),
    (1, 19, 5, 130, 2, 0),
    (3, 7, 33, 70, 1, 0),
]


def _exact(source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int) -> torch.Tensor:
    image = source.double().permute(2, 0, 1).unsqueeze(0)
    wide = None if bias is None else bias.double()
    return F.conv2d(image, weight.double(), wide, padding=(0, padding))[0].permute(1, 2, 0)


#: tile -> largest error that is accepted, relative to the largest sum of magnitudes
BOUNDS = {0: 5e-7, 2: 5e-7, 4: 1e-6, 5: 1e-6}
EDGES = {2: 3, 4: 3, 5: 2}
CASES = [(*shape, tile) for tile in BOUNDS for shape in SHAPES if tile == 0 or shape[4] == EDGES[tile]]
CASES += [
    (*shape, EDGES[tile], padding, tile)
    for tile in EDGES
    for *shape, padding in ((9, 11, 150, 40, 1), (5, 6, 16, 33, 0))
]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "width", "channels", "outputs", "edge", "padding", "tile"), CASES)
def test_equals_a_float64_convolution(
    rows: int, width: int, channels: int, outputs: int, edge: int, padding: int, tile: int, biased: bool, isa: str
) -> None:
    source, weight = torch.randn(rows + edge - 1, width, channels), torch.randn(outputs, channels, edge, edge)
    bias = torch.randn(outputs) if biased else None
    kernel = pack(weight, tile)
    assert relative_error(kernel.unpack(), weight) <= (1e-6 if tile else 0)
    expected = _exact(source, weight, bias, padding)
    magnitude = _exact(source.abs(), weight.abs(), None, padding).max()
    for backend in ("cpu", "reference"):
        out = torch.full(tuple(expected.shape), torch.nan)
        conv_rows(source, kernel, bias, out, padding=padding, backend=backend)
        assert float((out - expected).abs().max() / magnitude) <= BOUNDS[tile]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([(1, 0), (2, 0), (3, 0), (3, 2), (3, 4), (2, 5)]),
    rows=st.integers(1, 13),
    width=st.integers(1, 30),
    channels=st.integers(1, 50),
    outputs=st.integers(1, 140),
    padding=st.integers(0, 2),
    biased=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_a_float64_convolution_on_odd_shapes(
    kind: tuple[int, int],
    rows: int,
    width: int,
    channels: int,
    outputs: int,
    padding: int,
    biased: bool,
    seed: int,
    isa: str,
) -> None:
    (edge, tile), generator = kind, torch.Generator().manual_seed(seed)
    padding = min(padding, edge - 1)
    width = max(width, edge - 2 * padding)
    source = torch.randn(rows + edge - 1, width, channels, generator=generator)
    weight = torch.randn(outputs, channels, edge, edge, generator=generator)
    bias = torch.randn(outputs, generator=generator) if biased else None
    expected = _exact(source, weight, bias, padding)
    magnitude = _exact(source.abs(), weight.abs(), None if bias is None else bias.abs(), padding).max()
    out = torch.full(tuple(expected.shape), torch.nan)
    conv_rows(source, pack(weight, tile), bias, out, padding=padding, backend="cpu")
    assert float((out - expected).abs().max() / magnitude) <= BOUNDS[tile]


@pytest.mark.parametrize(("tile", "bound"), [(0, 4e-7), (2, 4e-7), (4, 1.3e-6), (5, 1.3e-6)])
def test_long_sums_lose_little(isa: str, tile: int, bound: float) -> None:
    """4608 products added one after another would be off by about 1.2e-6 (root mean square)."""
    generator = torch.Generator().manual_seed(0)
    edge = EDGES.get(tile, 3)
    source = F.silu(torch.randn(3 + edge, 16, 512, generator=generator))
    weight = torch.randn(64, 512, edge, edge, generator=generator)
    out = torch.empty(4, 19 - edge, 64)
    conv_rows(source, pack(weight, tile), None, out)
    expected = _exact(source, weight, None, 1)
    assert float((out - expected).square().mean().sqrt() / expected.square().mean().sqrt()) <= bound


@pytest.mark.parametrize("tile", [0, 2, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_neither_strips_nor_threads_change_a_bit(tile: int, count: int, isa: str) -> None:
    edge = EDGES.get(tile, 3)
    source, kernel = torch.randn(39 + edge, 21, 48), pack(torch.randn(80, 48, edge, edge), tile)
    bias, width = torch.randn(80), 24 - edge
    whole = torch.empty(40, width, 80)
    conv_rows(source, kernel, bias, whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        for first, last in ((0, 5), (5, 15), (15, 40)) if tile == 5 else ((0, 4), (4, 12), (12, 40)):
            strip = torch.empty(last - first, width, 80)
            conv_rows(source[first : last + edge - 1], kernel, bias, strip)
            assert torch.equal(strip, whole[first:last])
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_refused() -> None:
    kernel, source = pack(torch.randn(8, 16, 3, 3)), torch.zeros(4, 5, 16)
    with pytest.raises(ValueError, match="k 1, 2 or 3"):
        pack(torch.randn(8, 16, 4, 4))
    with pytest.raises(ValueError, match="k 1, 2 or 3"):
        pack(torch.randn(8, 16, 3, 3).double())
    for tile, edge in ((3, 3), (4, 2), (5, 3)):
        with pytest.raises(ValueError, match="tiles are 2 or 4"):
            pack(torch.randn(8, 16, edge, edge), tile)
    with pytest.raises(ValueError, match=r"source is \[rows, W, 16\]"):
        conv_rows(source[..., :8], kernel, None, torch.empty(2, 5, 8))
    with pytest.raises(ValueError, match=r"out is \[2, 5, 8\]"):
        conv_rows(source, kernel, None, torch.empty(4, 5, 8))
    with pytest.raises(ValueError, match=r"bias is \[8\]"):
        conv_rows(source, kernel, torch.zeros(1), torch.empty(2, 5, 8))
    with pytest.raises(ValueError, match="fp32"):
        conv_rows(source, kernel, None, torch.empty(2, 5, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        conv_rows(source, kernel, None, torch.empty(2, 8, 5).transpose(1, 2), backend="cpu")
