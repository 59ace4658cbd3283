"""Triton kernels against their references: on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from gear_engine.ops import (
    codebook_quantize,
    decode_attention,
    dual_readout,
    group_norm_silu,
    philox,
    residual_moments,
    sample_tokens,
    sign_bits,
    skinny_linear,
    soft_readout,
)
from gear_engine.ops.backends import resolve
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams
from tests.golden_weights import relative_error
from tests.ops.sampling_tables import table_of_rows
from tests.ops.test_dual_readout import operands, values

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies fp32 and fp16 like a GPU; for bf16 its tl.dot is wrong, so that runs on GPUs only.
DOT_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

SETTINGS = [
    SamplingParams(cfg_scale=4.0, temperature=0.9, top_k=50),
    SamplingParams(cfg_scale=1.5, top_p=0.9),
    SamplingParams(top_k=200, top_p=0.95, temperature=1.1),
    SamplingParams(sample_logits=False),
    SamplingParams(),
    SamplingParams(top_k=1),
]


def test_philox_equals_the_reference_bit_for_bit() -> None:
    seeds = torch.tensor([0, 1, 2**62 + 12345, 987654321987], device=DEVICE)
    positions = torch.tensor([0, 5, 255, 1000], device=DEVICE)
    kernel = resolve("philox", DEVICE, torch.float32, "triton").load()
    for vocab_size in (1, 503, 1024, 2049):
        assert torch.equal(kernel(seeds, positions, vocab_size), philox.reference(seeds, positions, vocab_size)), (
            vocab_size
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "n_head", "n_kv_head", "head_dim", "entries"), [(3, 4, 4, 32, 81), (2, 4, 2, 72, 150), (1, 2, 1, 100, 3)]
)
def test_decode_attention(
    rows: int, n_head: int, n_kv_head: int, head_dim: int, entries: int, dtype: torch.dtype
) -> None:
    slots = torch.randperm(5, device=DEVICE)[:rows]
    positions = torch.randint(0, entries - 1, (rows,), device=DEVICE)
    positions[0] = entries - 2
    qkv = torch.randn(rows, (n_head + 2 * n_kv_head) * head_dim, device=DEVICE).to(dtype)
    cache = torch.randn(2, 5, n_kv_head, entries, head_dim, device=DEVICE).to(dtype)
    cache[0, :, :, 0] = 0
    bias = torch.tensor([0.0, 1.3, float("-inf"), 2.0, 0.0], device=DEVICE)
    rope = torch.randn(entries, head_dim // 2, 2, device=DEVICE)
    expected_cache = cache.clone()
    expected = decode_attention.reference(
        qkv, expected_cache[0], expected_cache[1], bias, slots, positions, rope, n_head
    )
    cache[0, :, :, 0] = float("nan")  # prefix keys are never read
    actual = decode_attention.decode_attention(
        qkv, cache[0], cache[1], bias, slots, positions, rope, n_head, backend="triton"
    )
    assert relative_error(actual, expected) <= TOLERANCE[dtype]
    cache[0, :, :, 0] = 0
    assert relative_error(cache, expected_cache) <= TOLERANCE[dtype]
    untouched = torch.ones_like(cache, dtype=torch.bool)
    untouched[:, slots, :, positions + 1] = False
    assert torch.equal(cache[untouched], expected_cache[untouched])


def test_decode_attention_leaves_inert_rows_alone() -> None:
    slots, positions = torch.tensor([2, -1, 0], device=DEVICE), torch.tensor([5, 10**6, 0], device=DEVICE)
    qkv = torch.randn(3, 8 * 12, device=DEVICE)
    qkv[1] = float("nan")
    cache, rope = torch.randn(2, 3, 2, 8, 12, device=DEVICE), torch.randn(8, 6, 2, device=DEVICE)
    cache[0, :, :, 0] = 0
    expected_cache, bias = cache.clone(), torch.zeros(3, device=DEVICE)
    args = (bias, slots, positions, rope, 4)
    expected = decode_attention.reference(qkv, expected_cache[0], expected_cache[1], *args)
    out = decode_attention.decode_attention(qkv, cache[0], cache[1], *args, backend="triton")
    assert relative_error(out, expected) <= 2e-6
    assert not out[1].any()
    assert relative_error(cache, expected_cache) <= 2e-6
    assert torch.equal(cache[:, 1], expected_cache[:, 1])


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(2, 100, 70), (17, 256, 33), (1, 48, 1)])
def test_skinny_linear(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=DEVICE) / in_features**0.5).to(dtype)

    x, weight, gate = random(rows, in_features), random(out_features, in_features), random(out_features, in_features)
    norm_weight, residual = 1 + random(in_features), random(rows, out_features)
    for options in (
        {},
        {"norm_weight": norm_weight},
        {"norm_weight": norm_weight, "gate": gate},
        {"residual": residual},
    ):
        actual = skinny_linear.skinny_linear(x, weight, **options, backend="triton")
        assert relative_error(actual, skinny_linear.reference(x, weight, **options)) <= TOLERANCE[dtype], options


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_skinny_linear_gives_a_row_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, weight, norm = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((33, 200), (40, 200), (200,)))
    # In the interpreter a product is numpy's, whose sums follow a row's place among the 16 of a program.
    moved = ((15, 1), (14, 17)) if DEVICE.type == "cuda" else ()
    for options in ({}, {"norm_weight": norm, "gate": weight.flip(0)}):
        together = skinny_linear.skinny_linear(x, weight, **options, backend="triton")
        for first, rows in ((0, 1), (0, 17), (16, 16), (32, 1), *moved):
            some = skinny_linear.skinny_linear(x[first : first + rows], weight, **options, backend="triton")
            assert torch.equal(some, together[first : first + rows])


@pytest.mark.parametrize("vocab_size", [17, 503, 1024])
@pytest.mark.parametrize("noise_given", [True, False])
def test_sample_tokens(vocab_size: int, noise_given: bool) -> None:
    table = SamplingTable.build(SETTINGS, [p.uses_guidance for p in SETTINGS], vocab_size, DEVICE)
    for trial in range(4):
        logits = torch.randn(table.rows, vocab_size, device=DEVICE) * (1 + trial)
        source = {
            "seeds": torch.randint(0, 2**62, (len(SETTINGS),), device=DEVICE),
            "positions": torch.randint(0, 256, (len(SETTINGS),), device=DEVICE),
        }
        if noise_given:
            source = {"noise": torch.empty(len(SETTINGS), vocab_size, device=DEVICE).exponential_()}
        expected = sample_tokens.reference(logits, table, **source)
        assert torch.equal(sample_tokens.sample_tokens(logits, table, **source, backend="triton"), expected)


def test_sample_tokens_from_a_table_that_the_host_does_not_know() -> None:
    table = SamplingTable.build(SETTINGS, [p.uses_guidance for p in SETTINGS], 203, DEVICE)
    logits = torch.randn(table.rows, 203, device=DEVICE)
    seeds = torch.arange(table.rows, device=DEVICE)
    positions = seeds + 7
    images = len(SETTINGS)
    expected = sample_tokens.reference(logits, table, seeds=seeds[:images], positions=positions[:images])
    blind = table_of_rows(table)
    for backend in ("triton", "reference"):
        tokens = sample_tokens.sample_tokens(logits, blind, seeds=seeds, positions=positions, backend=backend)
        assert torch.equal(tokens[:images], expected), backend
        assert not tokens[images:].any()


def test_top_k_keeps_all_ties() -> None:
    settings = [SamplingParams(top_k=3)]
    table = SamplingTable.build(settings, [False], 64, DEVICE)
    logits = torch.zeros(1, 64, device=DEVICE)
    logits[0, 10] = 1.0  # 1 distinct, then 63 ties at the threshold: all stay
    for token in (0, 10, 40, 63):
        noise = torch.ones(1, 64, device=DEVICE)
        noise[0, token] = 1e-6
        assert sample_tokens.sample_tokens(logits, table, noise=noise, backend="triton").item() == token
    logits[0, 20:22] = 0.5
    noise = torch.ones(1, 64, device=DEVICE)
    noise[0, 40] = 1e-6  # the third largest is 0.5: the zeros are gone
    assert sample_tokens.sample_tokens(logits, table, noise=noise, backend="triton").item() in (10, 20, 21)


@pytest.mark.parametrize("metric", ["l2", "l2_normalized", "inner_product"])
@pytest.mark.parametrize(("rows", "codes", "width"), [(33, 300, 8), (5, 129, 14), (1, 7, 1), (0, 4, 3)])
def test_codebook_quantize(rows: int, codes: int, width: int, metric: codebook_quantize.Metric) -> None:
    z, codebook = torch.randn(rows, width, device=DEVICE), torch.randn(codes, width, device=DEVICE)
    if metric == "l2_normalized" and width == 1:
        z, codebook = z.abs(), codebook.abs()  # every code is then the same point: the lowest index wins
    indices, quantized = codebook_quantize.codebook_quantize(z, codebook, metric, backend="triton")
    expected_indices, expected = codebook_quantize.reference(z, codebook, metric)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(quantized, expected)


def test_codebook_quantize_takes_the_lowest_of_equal_codes() -> None:
    codebook = torch.tensor([[3.0, 1.0], [1.0, 2.0], [1.0, 2.0]], device=DEVICE).repeat(100, 1)
    z = torch.tensor([[1.0, 2.0], [3.0, 0.0]], device=DEVICE)
    for metric in ("l2", "inner_product"):
        indices, _ = codebook_quantize.codebook_quantize(z, codebook, metric, backend="triton")
        assert indices.tolist() == codebook_quantize.reference(z, codebook, metric)[0].tolist()
    assert codebook_quantize.codebook_quantize(z, codebook, "l2", backend="triton")[0].tolist() == [1, 0]


@pytest.mark.parametrize("distance", ["l2", "l2_normalized", "inner_product", "lfq"])
@pytest.mark.parametrize(("rows", "codes", "width", "columns"), [(70, 90, 5, 40), (1, 3, 1, 1), (0, 4, 2, 5)])
def test_dual_readout_and_soft_readout(rows: int, codes: int, width: int, columns: int, distance: str) -> None:
    inputs = [x.to(DEVICE) for x in operands(rows, codes, width, columns, distance, torch.float32)]
    *actual, indices = values(dual_readout.dual_readout, inputs, 0.3, distance, backend="triton")
    *expected, _ = values(dual_readout.reference, [x.double() for x in inputs], 0.3, distance)
    assert torch.equal(indices, dual_readout.reference(*inputs, 0.3, distance)[0])
    soft = soft_readout.soft_readout(*inputs, 0.3, distance, backend="triton")
    for got, want in zip((soft, *actual), (expected[0], *expected), strict=True):
        assert got.shape == want.shape
        if want.numel():
            assert float((got.double() - want).abs().max()) <= 1e-4 * max(1.0, float(want.abs().max()))


def test_dual_readout_of_a_wide_codebook_and_a_sharp_softmax() -> None:
    inputs = [x.to(DEVICE) for x in operands(19, 40, 100, 70, "inner_product", torch.float32)]
    *actual, _ = values(dual_readout.dual_readout, inputs, 0.05, "inner_product", backend="triton")
    *expected, _ = values(dual_readout.reference, [x.double() for x in inputs], 0.05, "inner_product")
    for got, want in zip(actual, expected, strict=True):
        assert float((got.double() - want).abs().max()) <= 1e-3 * max(1.0, float(want.abs().max()))
    far = [torch.tensor([[1.0], [1e4]]), torch.tensor([[0.0], [1e4], [-1e4]]), torch.eye(3)]
    soft, *gradients, _ = values(dual_readout.dual_readout, [x.to(DEVICE) for x in far], 1.0, "l2", backend="triton")
    assert soft.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


#: (images, height, width, channels, groups): more rows than a strip, pixels and lanes than a block, and fewer.
IMAGES = [(1, 1, 2, 4, 4), (2, 2, 2, 36, 3), (1, 5, 37, 28, 7), (1, 2, 1, 200, 1), (2, 1, 3, 144, 36)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("images", "height", "width", "channels", "groups", "affine"),
    [(*sizes, kind) for sizes, kind in zip(IMAGES, ["none", "own", "shared", "shared", "own"], strict=True)],
)
def test_group_norm_silu(
    images: int, height: int, width: int, channels: int, groups: int, affine: str, dtype: torch.dtype
) -> None:
    x = (torch.randn(images, height, width, channels, device=DEVICE) * 3 + 10).to(dtype)
    # Moments of whole images, of which x holds strips.
    rows = torch.cat((x, x[:, :1].repeat(1, 33, 1, 1) - 1), dim=1).double().unflatten(3, (groups, -1))
    moments = torch.stack((rows.sum((2, 4)), rows.square().sum((2, 4))), dim=-1)
    shape = {"none": None, "shared": (2, channels), "own": (2, images, channels)}[affine]
    weight, bias = (None, None) if shape is None else torch.randn(shape, device=DEVICE)
    for silu in (True, False):
        actual, expected = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x, dtype=torch.float32)
        group_norm_silu.group_norm_silu(x, moments, weight, bias, expected, silu=silu, backend="reference")
        group_norm_silu.group_norm_silu(x, moments, weight, bias, actual, silu=silu, backend="triton")
        assert relative_error(actual, expected) <= 5e-6
    alone = torch.empty_like(actual[-1])
    own = (None if t is None else t if t.dim() == 1 else t[-1] for t in (weight, bias))
    group_norm_silu.group_norm_silu(x[-1], moments[-1], *own, alone, silu=False, backend="triton")
    assert torch.equal(alone, actual[-1]), "an image depends on its batch"
    group_norm_silu.group_norm_silu(x, moments, weight, bias, x, silu=False, backend="triton")  # in place
    # The interpreter cuts bf16 off where a GPU rounds it.
    assert relative_error(x, expected) <= (5e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("images", "height", "width", "channels", "groups"), IMAGES)
@pytest.mark.parametrize("mode", ["moments", "store", "accumulate", "phases0", "phases1"])
def test_residual_moments(
    images: int, height: int, width: int, channels: int, groups: int, mode: str, dtype: torch.dtype
) -> None:
    """Of stacked images; with an offset, phases are those of one image."""
    height *= images
    offset = int(mode[-1]) if mode.startswith("phases") else None
    shape = (height, width, channels) if offset is None else (height + offset, width + offset, 4, channels)
    if offset is not None:
        height, width = 2 * height, 2 * width
    source, found = torch.randn(shape, device=DEVICE).to(dtype) + 3, []
    start = None if mode == "moments" else torch.randn(height, width, channels, device=DEVICE)
    for backend in ("reference", "triton"):
        residual = None if start is None else start.clone()
        moments = torch.full((height, groups, 2), float("nan"), dtype=torch.float64, device=DEVICE)
        options = {"accumulate": mode == "accumulate", "phase_offset": offset, "backend": backend}
        residual_moments.residual_moments(source, residual, moments, **options)
        found.append((residual, moments))
    (expected, expected_moments), (actual, actual_moments) = found
    assert actual is None or torch.equal(actual, expected)
    torch.testing.assert_close(actual_moments, expected_moments, rtol=1e-12, atol=1e-12)
    if offset is None:
        last = torch.empty_like(actual_moments[-1:])
        options = {"accumulate": mode == "accumulate", "backend": "triton"}
        residual_moments.residual_moments(source[-1:], None if start is None else start[-1:], last, **options)
        assert torch.equal(last, actual_moments[-1:]), "a row depends on the others"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "groups", "width"), [(140, 1, 15), (90, 5, 3), (1, 1, 62), (0, 3, 4)])
def test_sign_bits(rows: int, groups: int, width: int, dtype: torch.dtype) -> None:
    """Every third row of a transposed one, with zeros of both signs."""
    z = torch.randint(-2, 3, (groups * width, 3 * rows), device=DEVICE).to(dtype).t()[::3]
    z[:1, :2] = torch.tensor([-0.0, torch.nan])
    found, expected = sign_bits.sign_bits(z, groups, backend="triton"), sign_bits.reference(z, groups)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[1].dtype == dtype
