"""codebook_quantize: every compiled path gives the official index."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.errors import BackendUnavailableError
from gear_engine.ops import native
from gear_engine.ops.codebook_quantize import codebook_quantize, reference
from tests.ops.cpu_paths import LEVELS, PATHS, forced

METRICS = ("l2", "l2_normalized", "inner_product")
#: The op has no code of its own for the vector dot products ("avx512-dot").
CODE_PATHS = ("portable", "avx2", "avx512", "avx512-amx")


@pytest.fixture(params=CODE_PATHS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one code path."""
    with forced(request.param):
        yield request.param


def formula(z: torch.Tensor, codebook: torch.Tensor, metric: str) -> torch.Tensor:
    """The index by the documented order: the product as a chain of fused multiply-adds.

    A product of two fp32 numbers is exact in double; the sum is rounded to double and then to fp32, which differs from
    one rounding for about one term in 2**29.
    """
    if metric == "l2_normalized":
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    dot = torch.zeros(z.shape[0], codebook.shape[0])
    for i in range(z.shape[1]):
        dot = (dot.double() + z[:, i : i + 1].double() * codebook[:, i].double()).float()
    if metric == "inner_product":
        best = dot.max(dim=1, keepdim=True).values
        return (best - dot <= 2.0**-25).int().argmax(dim=1)
    return ((z**2).sum(dim=1, keepdim=True) + (codebook**2).sum(dim=1) - 2 * dot).argmin(dim=1)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 700),
    d=st.one_of(st.integers(1, 24), st.sampled_from([31, 72, 100, 255, 512])),
    metric=st.sampled_from(METRICS),
    scale=st.sampled_from([1e-4, 1.0, 50.0]),
    level=st.sampled_from(CODE_PATHS),
    seed=st.integers(0, 10**6),
)
def test_matches_the_formula_on_odd_shapes(
    n: int, k: int, d: int, metric: str, scale: float, level: str, seed: int
) -> None:
    if LEVELS.index(PATHS[level][0]) > LEVELS.index(native.module().best_cpu_isa()):
        return
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator) * scale
    codebook = torch.randn(k, d, generator=generator)
    with forced(level):
        indices, quantized = codebook_quantize(z, codebook, metric, backend="cpu")  # type: ignore[arg-type]
    assert torch.equal(indices, formula(z, codebook, metric))
    expected = F.normalize(codebook, dim=-1) if metric == "l2_normalized" else codebook
    assert torch.equal(quantized, expected[indices])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [8, 14, 96])
def test_matches_the_official_form(level: str, metric: str, d: int) -> None:
    z, codebook = torch.randn(1000, d), torch.randn(3000, d)
    indices, quantized = codebook_quantize(z, codebook, metric, backend="cpu")  # type: ignore[arg-type]
    official, official_quantized = reference(z, codebook, metric)  # type: ignore[arg-type]
    assert torch.equal(indices, official)
    assert torch.equal(quantized, official_quantized)


@pytest.mark.parametrize("metric", METRICS)
def test_lowest_index_of_a_tie(level: str, metric: str) -> None:
    half = torch.randn(300, 8)
    codebook = torch.cat([half, half.flip(0), half])  # every vector three times
    z = torch.randn(500, 8)
    indices, _ = codebook_quantize(z, codebook, metric, backend="cpu")  # type: ignore[arg-type]
    assert torch.equal(indices, reference(z, codebook, metric)[0])  # type: ignore[arg-type]
    assert int(indices.max()) < 300


@pytest.mark.parametrize("metric", METRICS)
def test_distances_that_differ_by_a_rounding(level: str, metric: str) -> None:
    """Codes one unit in the last place apart: the approximate pass leaves most of them open."""
    codebook = torch.randn(1, 14).repeat(2000, 1)
    codebook = torch.nextafter(codebook, codebook + torch.randint(-1, 2, codebook.shape))
    z = codebook[:100] + torch.randn(100, 14) * 1e-3
    indices, _ = codebook_quantize(z, codebook, metric, backend="cpu")  # type: ignore[arg-type]
    assert torch.equal(indices, formula(z, codebook, metric))


def test_softmax_merges_products_that_are_closer_than_its_rounding(level: str) -> None:
    z, codebook = torch.randn(2000, 16), torch.randn(4096, 16) * 1e-5
    indices, _ = codebook_quantize(z, codebook, "inner_product", backend="cpu")
    assert torch.equal(indices, formula(z, codebook, "inner_product"))
    product = z @ codebook.t()
    assert not torch.equal(indices, product.argmax(dim=1)), "the case does not show what it is for"


@pytest.mark.parametrize("metric", METRICS)
def test_zeros_and_extremes(level: str, metric: str) -> None:
    z = torch.randn(9, 5)
    z[0], z[1], z[2] = 0.0, 1e-30, 1e18
    codebook = torch.randn(300, 5)
    codebook[7], codebook[9], codebook[11] = 0.0, 1e-40, 1e17
    indices, _ = codebook_quantize(z, codebook, metric, backend="cpu")  # type: ignore[arg-type]
    assert torch.equal(indices, formula(z, codebook, metric))


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_not_a_number_ends_in_the_official_index(level: str, metric: str) -> None:
    z, codebook = torch.randn(4, 6), torch.randn(40, 6)
    z[1, 3] = torch.nan
    indices, _ = codebook_quantize(z, codebook, metric, backend="cpu")  # type: ignore[arg-type]
    assert torch.equal(indices, reference(z, codebook, metric)[0])  # type: ignore[arg-type]


def test_strided_input_and_no_rows() -> None:
    z, codebook = torch.randn(8, 30).t()[::2], torch.randn(16, 100).t()[:, ::2]
    indices, quantized = codebook_quantize(z, codebook, "l2", backend="cpu")
    assert torch.equal(indices, reference(z, codebook, "l2")[0])
    assert torch.equal(quantized, codebook[indices])
    indices, quantized = codebook_quantize(z[:0], codebook, "l2", backend="cpu")
    assert indices.shape == (0,)
    assert quantized.shape == (0, 8)


def test_blocks_that_bf16_proposals_leave_open(level: str) -> None:
    """Few codes near, thousands near for a few rows or for many, and no finite bound: in blocks of 256 rows."""
    centre = torch.randn(40)
    codebook = torch.cat([torch.randn(500, 40), centre + torch.randn(3000, 40) * 1e-4])
    z = torch.randn(600, 40)
    z[300:400] = centre + torch.randn(100, 40) * 1e-4
    z[560:570] = centre + torch.randn(10, 40) * 1e-4
    z[20, 3] = torch.inf
    finite = torch.arange(600) != 20
    for metric in ("l2", "inner_product"):
        indices, quantized = codebook_quantize(z, codebook, metric, backend="cpu")  # type: ignore[arg-type]
        assert torch.equal(indices[finite], formula(z[finite], codebook, metric))
        assert torch.equal(indices[20:21], reference(z[20:21], codebook, metric)[0])  # type: ignore[arg-type]
        assert torch.equal(quantized, codebook[indices])


@pytest.mark.parametrize("width", [8, 100])
def test_the_number_of_threads_changes_nothing(level: str, width: int) -> None:
    z, codebook = torch.randn(1000, width), torch.randn(5000, width)
    module = native.module()
    found = []
    for threads in (1, 2, 5):
        module.set_num_threads(threads)
        found.append(codebook_quantize(z, codebook, "l2_normalized", backend="cpu")[0])
    module.set_num_threads(torch.get_num_threads())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_bad_arguments() -> None:
    z, codebook = torch.randn(4, 8), torch.randn(16, 8)
    with pytest.raises(ValueError, match="metric"):
        codebook_quantize(z, codebook, "cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit"):
        codebook_quantize(z, codebook[:, :7], "l2")
    with pytest.raises(ValueError, match="rows"):
        codebook_quantize(z, codebook[:0], "l2")
    with pytest.raises(ValueError, match=r"float64"):
        codebook_quantize(z, codebook.double(), "l2")
    with pytest.raises(BackendUnavailableError, match="takes float32"):
        codebook_quantize(z.bfloat16(), codebook.bfloat16(), "l2", backend="cpu")


def test_levels_can_be_asked_for_by_name_only() -> None:
    with pytest.raises(ValueError, match="none of portable"):
        native.module().set_cpu_isa("mmx")
