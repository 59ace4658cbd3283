"""Bytes and operations of every op, worked out by hand for two shapes each."""

from __future__ import annotations

import pytest

from gear_engine.bench import counts
from gear_engine.bench.counts import Counts
from gear_engine.config import GENERATOR_PRESETS, TOKENIZER_PRESETS, GeneratorConfig, TokenizerConfig

GROUPED = GeneratorConfig(
    dim=8, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=12, vocab_size=6, block_size=9, num_classes=3
)
TINY = GeneratorConfig(dim=8, n_layer=1, n_head=2, ffn_dim=16, vocab_size=10, block_size=4, num_classes=3)


def test_skinny_linear() -> None:
    # weights 768 * 2304 * 4, x 2 * 768 * 4, out 2 * 2304 * 4, norm 768 * 4
    assert counts.skinny_linear(2, 768, 2304, "fp32", norm=True) == Counts(
        7_077_888 + 6_144 + 18_432 + 3_072, 2 * 2 * 768 * 2304 + 4 * 2 * 768
    )
    # two int8 weights of 10 x 100 with 10 fp32 scales each, x 3 * 100 * 4, out 3 * 10 * 4; 5 operations per output
    assert counts.skinny_linear(3, 100, 10, "int8-packed", gate=True) == Counts(
        2 * (1000 + 40) + 1200 + 120, 2 * 2 * 3 * 100 * 10 + 5 * 30
    )
    # bf16: weights 48, x 8, residual 12, out 12
    assert counts.skinny_linear(1, 4, 6, "bf16", residual=True) == Counts(80, 48 + 6)


def test_decode_attention() -> None:
    # One head of 4 at the first token, fp32: qkv 48, no key, one value 16, new key and value 32, out 16, rope 16;
    # scores 2 * 4 * 1, softmax 3 * 2, values 2 * 4 * 2, rotation 3 * 8.
    assert counts.decode_attention(1, 1, 1, 4, 0, 4) == Counts(128, 8 + 6 + 16 + 24)
    # Two rows, four heads on two of 8, token 3, bf16. A row: qkv 128, keys of 3 entries 96, values of 4 entries 128,
    # new entry 64, out 64; a head: 2 * 8 * 4 + 3 * 5 + 2 * 8 * 5; rotation 3 * (4 + 2) * 8 a row.
    assert counts.decode_attention(2, 4, 2, 8, 3, 2) == Counts(
        2 * (128 + 96 + 128 + 64 + 64) + 32, 2 * (4 * (64 + 15 + 80) + 144)
    )


def test_sample_tokens() -> None:
    # two rows of ten fp32 logits, one int64; 3 for guidance, 1 + 3 + 2
    assert counts.sample_tokens(1, 10, guided=True) == Counts(80 + 8, 10 * 9)
    # three rows of 100 and as much noise, three int64
    assert counts.sample_tokens(3, 100, guided=False, noise_given=True) == Counts(2400 + 24, 300 * 6)


def test_torch_exponential() -> None:
    assert counts.torch_exponential(3, 100) == Counts(1200, 300)


def test_codebook_quantize() -> None:
    # z 4 x 2 and codes 8 x 2 in fp32, four int64 and four codes; 2 * 4 * 8 * 2 + 4 * 8
    assert counts.codebook_quantize(4, 8, 2) == Counts(32 + 64 + 32 + 32, 128 + 32)
    assert counts.codebook_quantize(4096, 16384, 8) == Counts(
        4096 * 32 + 16384 * 32 + 4096 * 8 + 4096 * 32, 4096 * 16384 * 17
    )


def test_coder_ops() -> None:
    # 10 vectors of 6 read and written, two int64 each
    assert counts.sign_bits(10, 6, 2) == Counts(240 + 240 + 160, 60)
    assert counts.sign_bits(1, 14, 1) == Counts(56 + 56 + 8, 14)
    # z 2 x 3, codebook 5 x 3, table 5 x 7, result 2 x 7; 2 * 10 * 10 + 4 * 10
    assert counts.soft_readout(2, 5, 3, 7) == Counts(24 + 60 + 140 + 56, 200 + 40)
    assert counts.soft_readout(1, 1, 1, 1) == Counts(16, 4 + 4)
    # the same and an int64 per vector; a comparison per vector and code
    assert counts.dual_readout(2, 5, 3, 7) == Counts(24 + 60 + 140 + 56 + 16, 240 + 10)
    assert counts.dual_readout(1, 1, 1, 1) == Counts(16 + 8, 8 + 1)
    # source 6 x 5 x 2, weight 3 x 2 x 3 x 3, result 4 x 5 x 3; 18 multiply-adds per number
    assert counts.conv_rows(4, 5, 2, 3, 3) == Counts(4 * (60 + 54 + 60), 2 * 60 * 18)
    # source 2 x 3 x 4, weight 1 x 4 x 2 x 2, result 1 x 4 x 1; 16 multiply-adds per number
    assert counts.conv_rows(1, 3, 4, 1, 2) == Counts(4 * (24 + 16 + 4), 2 * 4 * 16)
    # 4 x 4 x 32 numbers read and written, 4 rows of 32 groups with two doubles, weight and bias
    assert counts.group_norm_silu(4, 32, 32) == Counts(2048 + 2048 + 4 * 32 * 16 + 256, 6 * 512)
    assert counts.group_norm_silu(1, 64, 32, 4, 2) == Counts(256 + 128 + 512 + 512, 6 * 64)
    assert counts.residual_moments(4, 32, 32) == Counts(2048 + 2048 + 2048, 3 * 512)
    assert counts.residual_moments(2, 64, 32, 2) == Counts(512 + 1024 + 1024, 3 * 256)


def test_decode_step() -> None:
    # qkv 768 + 32 + 96 + 32, attention 96 + 32 + 64 + 32 + 16, wo 256 + 32 + 64, swiglu 1024 + 32 + 64 + 32,
    # w2 512 + 64 + 64, head 320 + 32 + 40 + 32, an embedding 32
    assert counts.decode_step(TINY, 1, 0, "fp32").bytes == 928 + 240 + 352 + 1152 + 640 + 424 + 32
    # Three rows of GROUPED at token 2 in bf16. A block: qkv 256 + 48 + 96 + 16, wo 128 + 48 + 96,
    # swiglu 384 + 48 + 72 + 16, w2 192 + 72 + 96, attention 96 + 120 + 96 + 16; then head 96 + 48 + 36 + 16,
    # embeddings 48.
    # Operations of a block: 768 + 96, 384 + 24, 1152 + 96 + 180, 576 + 24, 6 (24 + 12 + 32) + 108; head 288 + 96.
    assert counts.decode_step(GROUPED, 3, 2, "bf16") == Counts(2 * 1896 + 196 + 48, 2 * 3816 + 384)
    # LlamaGen-B in bf16: 2 [L (4 d^2 + 3 d f) + V d] of weights and 4 L d bytes of cache per row and token
    base = GENERATOR_PRESETS["LlamaGen-B"]
    weights = 2 * (12 * (4 * 768**2 + 3 * 768 * 2048) + 16384 * 768)
    cache = 4 * 12 * 768 * 255
    assert counts.decode_step(base, 2, 255, "bf16").bytes == pytest.approx(weights + 2 * cache, rel=0.005)
    assert counts.decode_step(base, 2, 255, "bf16").ops == pytest.approx(
        2 * weights + 2 * 12 * 4 * 768 * 256, rel=0.005
    )


def test_prefill_and_rollout() -> None:
    # the value rows of wqkv only: 256 + 32 + 32 + 32; wo, swiglu, w2, head as above; a table row and a mean value of 32
    assert counts.prefill(TINY, 1, "fp32").bytes == 352 + 352 + 1152 + 640 + 424 + 64
    # A block of GROUPED: values 64 + 48 + 24 + 16, wo 272, swiglu 520, w2 360; head 196; rows and values 96.
    assert counts.prefill(GROUPED, 3, "bf16") == Counts(
        2 * (152 + 272 + 520 + 360) + 196 + 96, 2 * (288 + 408 + 1428 + 600) + 384
    )
    # prefill 2984, a step 3768, two draws of 40 + 8
    assert counts.rollout(TINY, 1, 2, "fp32", guided=False).bytes == 2984 + 3768 + 96
    # prefill 2900, 5832; a step at token 0: 192 bytes of cache and 456 operations fewer than at token 2; two draws
    assert counts.rollout(GROUPED, 3, 2, "bf16", guided=False) == Counts(
        2900 + 4036 - 192 + 2 * 96, 5832 + 8016 - 456 + 2 * 108
    )
    step, draw = counts.decode_step(TINY, 1, 0, "fp32"), counts.sample_tokens(1, 10, guided=False)
    assert counts.rollout(TINY, 1, 2, "fp32", guided=False) == counts.prefill(TINY, 1, "fp32") + step + draw * 2
    longer = counts.rollout(TINY, 1, 3, "fp32", guided=True)
    assert longer.ops > counts.rollout(TINY, 1, 2, "fp32", guided=True).ops


def test_decoder() -> None:
    # Two levels, 64 and 32 channels wide, a 4 x 4 latent of 8 x 8 pixels: convolutions first, then what attends.
    config = TokenizerConfig(
        family="vq", codebook_size=16, z_channels=16, ch=32, ch_mult=(1, 2), num_res_blocks=1, downsample=2
    )
    wide = 2 * 16 * 9 * 64 * 64  # a 3 x 3 convolution at 4 x 4
    convolutions = 2 * 16 * 8 * 16 + 2 * 16 * 9 * 16 * 64  # post_quant_conv, conv_in
    convolutions += 2 * 2 * wide + 2 * 2 * wide + 4 * wide  # two middle blocks, two of level 1, the upsampler at 8 x 8
    convolutions += 3 * 4 * 2 * 16 * 64 * 64  # q, k, v and projection of three attention blocks
    convolutions += 2 * 64 * (9 * 64 * 32 + 9 * 32 * 32 + 64 * 32) + 2 * 2 * 64 * 9 * 32 * 32  # two blocks of level 0
    convolutions += 2 * 64 * 9 * 32 * 3  # conv_out
    attention = 3 * 2 * 2 * 16 * 16 * 64
    parameters = 144 + 9280 + 4 * 74112 + 3 * 16768 + 36928 + 29984 + 18624 + 64 + 867
    assert counts.decoder(config, 1, 8, 8) == Counts(4 * (parameters + 3 * 64) + 8 * 16, convolutions + attention)
    assert counts.decoder(config, 2, 8, 16) == Counts(
        4 * (parameters + 3 * 2 * 128) + 8 * 2 * 32, 4 * convolutions + 8 * attention
    )
    # 253 GFLOP for a 256 px image through VQ-16; four times the pixels, four times the convolutions
    one = counts.decoder(TOKENIZER_PRESETS["VQ-16"], 1, 256, 256)
    assert one.ops == pytest.approx(253e9, rel=0.01)
    two = counts.decoder(TOKENIZER_PRESETS["VQ-16"], 2, 256, 256)
    assert two.ops == 2 * one.ops
    assert two.bytes - one.bytes == 4 * 3 * 256 * 256 + 8 * 16 * 16
