"""Bytes that a piece of work cannot avoid to move, and arithmetic operations that it cannot avoid to do.

Bytes: every operand read once and every result written once, whatever a cache may hold. Operations: a multiply-add is
two; index arithmetic, Philox and exponentials' insides are not counted (an exponential is one).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.tokenizers import build_tokenizer

__all__ = [
    "Counts",
    "codebook_quantize",
    "conv_rows",
    "decode_attention",
    "decode_step",
    "decoder",
    "dual_readout",
    "group_norm_silu",
    "prefill",
    "residual_moments",
    "rollout",
    "sample_tokens",
    "sign_bits",
    "skinny_linear",
    "soft_readout",
    "torch_exponential",
]

#: Bytes per weight of the storage kinds.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16-packed": 2, "int8-packed": 1}
#: Bytes per number of activations and cache beside weights of these kinds.
ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16-packed": 4, "int8-packed": 4}


@dataclass(frozen=True)
class Counts:
    """Bytes and operations of one call; they add up."""

    bytes: int
    ops: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.bytes + other.bytes, self.ops + other.ops)

    def __mul__(self, times: int) -> Counts:
        return Counts(self.bytes * times, self.ops * times)


def skinny_linear(
    rows: int, in_features: int, out_features: int, dtype: str, *, norm: bool = False, gate: bool = False,
    residual: bool = False,
) -> Counts:  # fmt: skip
    """Weights (twice with a gate, plus 4 bytes of scale per int8 row), x, out, residual and norm weight once.

    Operations: 2 R in out per product; RMSNorm 4 per number of x; SwiGLU 5 per output; a residual 1.
    """
    matrices = 2 if gate else 1
    width = ACTIVATION_BYTES[dtype]
    scales = 4 * out_features if dtype == "int8-packed" else 0
    moved = matrices * (in_features * out_features * WEIGHT_BYTES[dtype] + scales)
    moved += width * (rows * in_features + rows * out_features * (2 if residual else 1) + (in_features if norm else 0))
    ops = matrices * 2 * rows * in_features * out_features
    ops += 4 * rows * in_features * norm + 5 * rows * out_features * gate + rows * out_features * residual
    return Counts(moved, ops)


def decode_attention(rows: int, n_head: int, n_kv_head: int, head_dim: int, position: int, width: int) -> Counts:
    """One token per row at image-token index ``position`` = t; ``width`` bytes per number.

    Read: qkv, keys of entries 1 ... t, values of entries 0 ... t, one row of the fp32 RoPE table. Written: out, and the
    new key and value. Operations: per head 2 D (t + 1) for the scores (entry 0 has no key), 3 (t + 2) for the softmax,
    2 D (t + 2) for the values; 3 per rotated number of q and k.
    """
    entry = n_kv_head * head_dim
    moved = rows * width * (n_head * head_dim + 2 * entry)  # qkv
    moved += rows * width * entry * (position + position + 1)
    moved += rows * width * (2 * entry + n_head * head_dim)  # new key and value, out
    moved += 4 * head_dim  # (cos, sin) of head_dim / 2 pairs
    ops = rows * n_head * (2 * head_dim * (position + 1) + 3 * (position + 2) + 2 * head_dim * (position + 2))
    return Counts(moved, ops + 3 * rows * (n_head + n_kv_head) * head_dim)


def sample_tokens(images: int, vocab_size: int, *, guided: bool, noise_given: bool = False) -> Counts:
    """fp32 logits (twice as many rows when guided) and, if given, noise read once; an int64 per image written.

    Operations per image and token of the vocabulary: 3 for guidance, 1 for the temperature, 3 for the softmax
    (subtract, exponential, sum), 2 for the draw (divide, compare). Filters are comparisons that depend on the data.
    """
    rows = images * (2 if guided else 1)
    moved = 4 * vocab_size * (rows + (images if noise_given else 0)) + 8 * images
    return Counts(moved, images * vocab_size * (3 * guided + 1 + 3 + 2))


def torch_exponential(images: int, vocab_size: int) -> Counts:
    """fp32 noise written; a logarithm per number, counted as one operation as an exponential is."""
    return Counts(4 * images * vocab_size, images * vocab_size)


def codebook_quantize(vectors: int, codes: int, width: int, element: int = 4) -> Counts:
    """z and the codebook read, an int64 index and the code written per vector; 2 N K d to multiply, N K to compare."""
    moved = element * width * (vectors + codes) + vectors * (8 + element * width)
    return Counts(moved, vectors * codes * (2 * width + 1))


def sign_bits(vectors: int, width: int, groups: int, element: int = 4) -> Counts:
    """z read, signs and an int64 index per group written; a comparison per number."""
    return Counts(2 * element * vectors * width + 8 * vectors * groups, vectors * width)


def soft_readout(vectors: int, codes: int, width: int, channels: int, element: int = 4) -> Counts:
    """z, codebook and table read, the result written; 2 N K (d + C) to multiply, 4 N K for softmax."""
    moved = element * (vectors * (width + channels) + codes * (width + channels))
    return Counts(moved, 2 * vectors * codes * (width + channels) + 4 * vectors * codes)


def dual_readout(vectors: int, codes: int, width: int, channels: int, element: int = 4) -> Counts:
    """:func:`soft_readout`, and of every vector its nearest code: an int64 index written, N K to compare."""
    return soft_readout(vectors, codes, width, channels, element) + Counts(8 * vectors, vectors * codes)


def conv_rows(rows: int, width: int, inputs: int, outputs: int, edge: int, element: int = 4) -> Counts:
    """``rows`` rows of a convolution with a column of zeros at either side: source, weight and result once.

    2 in k k per number of the result, as a direct convolution has them: Winograd's transform needs fewer.
    """
    numbers = rows * (width + 3 - edge) * outputs
    moved = (rows + edge - 1) * width * inputs + outputs * inputs * edge**2 + numbers
    return Counts(element * moved, 2 * numbers * inputs * edge**2)


def group_norm_silu(edge: int, channels: int, groups: int, element: int = 4, out_element: int = 4) -> Counts:
    """x and float64 moments read, the result written; 2 per number for the norm and 4 for x / (1 + exp(-x))."""
    numbers = edge * edge * channels
    return Counts(numbers * (element + out_element) + 16 * edge * groups + 8 * channels, 6 * numbers)


def residual_moments(edge: int, channels: int, groups: int, element: int = 4) -> Counts:
    """The source read, an fp32 residual and float64 moments written; 3 per number: square and two sums."""
    numbers = edge * edge * channels
    return Counts(numbers * (element + 4) + 16 * edge * groups, 3 * numbers)


def _block(config: GeneratorConfig, rows: int, dtype: str, first_out: int) -> Counts:
    """The linear layers of one decoder block; the first projection has ``first_out`` outputs."""
    dim, ffn = config.dim, config.ffn_dim
    return (
        skinny_linear(rows, dim, first_out, dtype, norm=True)
        + skinny_linear(rows, dim, dim, dtype, residual=True)
        + skinny_linear(rows, dim, ffn, dtype, norm=True, gate=True)
        + skinny_linear(rows, ffn, dim, dtype, residual=True)
    )


def prefill(config: GeneratorConfig, rows: int, dtype: str) -> Counts:
    """Class labels: the table's rows, each block with the value rows of ``wqkv``, the head; prefix values written."""
    width = ACTIVATION_BYTES[dtype]
    total = _block(config, rows, dtype, config.kv_dim) * config.n_layer
    total = total + skinny_linear(rows, config.dim, config.vocab_size, dtype, norm=True)
    return total + Counts(width * rows * (config.dim + config.n_layer * config.kv_dim), 0)


def decode_step(config: GeneratorConfig, rows: int, position: int, dtype: str) -> Counts:
    """Every block's linear layers and attention at image-token index ``position``, the head, one embedding per row."""
    width = ACTIVATION_BYTES[dtype]
    attention = decode_attention(rows, config.n_head, config.n_kv_head, config.head_dim, position, width)
    total = (_block(config, rows, dtype, config.qkv_dim) + attention) * config.n_layer
    total = total + skinny_linear(rows, config.dim, config.vocab_size, dtype, norm=True)
    return total + Counts(width * rows * config.dim, 0)


def rollout(config: GeneratorConfig, images: int, tokens: int, dtype: str, *, guided: bool) -> Counts:
    """A prefill, ``tokens`` - 1 decode steps and ``tokens`` draws."""
    rows = images * (2 if guided else 1)
    total = prefill(config, rows, dtype) + sample_tokens(images, config.vocab_size, guided=guided) * tokens
    for position in range(tokens - 1):
        total = total + decode_step(config, rows, position, dtype)
    return total


def decoder(config: TokenizerConfig, images: int, height: int, width: int, element: int = 4) -> Counts:
    """Weights and int64 codes read and pixels written once; products and convolutions as torch's counter finds them.

    Activations between layers are not counted: a floor, which a decoder that keeps nothing in cache cannot reach.
    """
    rows, columns = config.latent_size(height, width)
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
        quant = torch.empty(images, config.codebook_embed_dim, rows, columns)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        tokenizer.decode(quant)
    parameters = sum(p.numel() for part in (tokenizer.decoder, tokenizer.post_quant_conv) for p in part.parameters())
    moved = element * (parameters + 3 * images * height * width) + 8 * images * rows * columns * config.num_codebooks
    return Counts(moved, counter.get_total_flops())
