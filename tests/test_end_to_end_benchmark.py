"""The whole-job and memory benchmarks on tiny models: their rows, checks and bounds."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from gear_engine.bench import counts, peak_memory, process_memory
from gear_engine.bench.end_to_end import Result, check, contestants, measure, rows_of, run_case
from gear_engine.bench.inputs import generator_weights
from gear_engine.bench.timing import Ceilings
from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.ops import native
from gear_engine.tokenizers import build_tokenizer, decoder_fast

GENERATOR = GeneratorConfig(dim=64, n_layer=1, n_head=2, vocab_size=97, block_size=16, num_classes=5)
TOKENIZER = TokenizerConfig(family="vq", codebook_size=97, z_channels=32, ch=32, ch_mult=(1, 2), downsample=2)
CEILINGS = Ceilings(1e10, {"float32": 2e10, "bfloat16": 1e10, "int8": 4e10})
pytestmark = pytest.mark.skipif(
    native.unavailable("decode_step_cpu") is not None or decoder_fast.unavailable() is not None,
    reason="needs the compiled module",
)
has_bf16 = decoder_fast.unavailable(torch.bfloat16) is None


def test_rows_of_a_whole_job() -> None:
    rows, checks = run_case(GENERATOR, TOKENIZER, 3, 10, 2, 0, None, CEILINGS)
    assert [row["what"] for row in rows] == ["gear_engine fp32", "gear_engine bf16", "gear_engine int8"]
    for row in rows:
        assert row["images"] == 3
        assert row["runs"] == 2
        assert 0 < row["tokens_s"] < row["median_s"]
        assert row["best_s"] <= row["median_s"]
        assert row["of_floor_%"] > 0
    assert checks["baseline"] == "gear_engine fp32"
    assert checks["equal_images"] == 3
    assert checks["largest_byte_difference"] == 0
    assert checks["psnr_dB"]["gear_engine fp32"] is None
    assert [row["decoder"] for row in rows] == ["float32"] + 2 * ["bfloat16" if has_bf16 else "float32"]
    if has_bf16:
        assert checks["psnr_dB"]["gear_engine bf16"] > 25
    else:
        assert checks["psnr_dB"]["gear_engine bf16"] is None


def test_other_tokens_and_other_pixels_are_found() -> None:
    weights = generator_weights(GENERATOR, 0, torch.device("cpu"))
    tokenizer = build_tokenizer(TOKENIZER).eval().requires_grad_(False)
    calls = contestants(weights, tokenizer, [1, 2], 16, None)
    results = measure(calls, 16, 1, 0)
    ours = results["gear_engine fp32"]
    tokens, images = ours.tokens.clone(), ours.images.clone()
    tokens[0, 3] = (tokens[0, 3] + 1) % 97
    images[1, 0, 0, 0] ^= 8
    calls["official"] = calls["gear_engine fp32"]
    results["official"] = Result([1.0], [2.0], [0.5], tokens, images)
    found = check(calls, results, 16)
    assert found["equal_images"] == 1
    assert found["largest_byte_difference"] == 8
    assert not found["ok"]
    row = next(row for row in rows_of(results, 2) if row["what"] == "gear_engine fp32")
    assert row["x official"] == pytest.approx(1 / row["median_s"])


def test_the_floor_is_bytes_or_products_and_the_decoder() -> None:
    weights = generator_weights(GENERATOR, 0, torch.device("cpu"))
    tokenizer = build_tokenizer(TOKENIZER).eval().requires_grad_(False)
    floor = contestants(weights, tokenizer, [1, 2], 16, None)["gear_engine fp32"].floor
    assert floor is not None
    decoder = counts.decoder(TOKENIZER, 2, 8, 8).ops
    block = weights.blocks[0]
    matrices = (weights.output, block.wqkv, block.wo, block.w1, block.w3, block.w2)
    linear = sum(matrix.nbytes // 4 for matrix in matrices)
    limits = {"fast": 1e30, "slow": 1.0}
    at = {
        (read, rate): floor(Ceilings(limits[read], {"float32": limits[rate]}))
        for read, rate in (("slow", "fast"), ("fast", "slow"))
    }
    cache = 2 * 2 * 2 * GENERATOR.kv_dim * 4 * (16 / 2 + 1)
    assert at["slow", "fast"] == pytest.approx(16 * (4 * linear + cache), rel=1e-6)
    scores = 4 * GENERATOR.n_head * GENERATOR.head_dim * (16 / 2 + 1)
    assert at["fast", "slow"] == pytest.approx(16 * 4 * (2 * linear + scores) + decoder, rel=1e-6)


def test_peak_memory_sees_what_is_held() -> None:
    """Pages that are touched raise the peak; the reset forgets them. They come from the system: a freed block of the
    allocator's would be resident already."""
    size = 32 << 20
    process_memory.reset_peak()
    before = process_memory.resident("VmHWM")
    with mmap.mmap(-1, size) as block:
        block.write(b"\1" * size)
        held = process_memory.resident("VmHWM")
    assert held - before >= 0.9 * size
    process_memory.reset_peak()
    assert process_memory.resident("VmHWM") < held - size // 2


def test_a_new_process_gives_its_json_or_the_end_of_its_errors(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text('{"peak": 5}')
    assert process_memory.in_new_process("json.tool", str(file)) == {"peak": 5}
    file.write_text("no JSON")
    with pytest.raises(RuntimeError, match=r"measuring memory failed: .*Expecting value"):
        process_memory.in_new_process("json.tool", str(file))


def test_table_names_what_is_over_the_limit() -> None:
    record = {"images": 1, "format": "bf16", "peak": 250e6, "building": 1e6, "parts": {"weights": 200e6}}
    (row,) = peak_memory.table([{**record, "ratio": 1.25, "ok": False}])
    assert row["<= 1.2"] == "NO"
    assert row["weights_MB"] == 200
