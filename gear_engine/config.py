"""What a model is: frozen configurations, validated once, and the published sizes by name.

Field names are those of the official ``ModelArgs`` (Tencent-Hunyuan/GEAR ``models/llamagen.py``), so that a
checkpoint's ``args`` and a configuration can be compared field by field.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from gear_engine.errors import ConfigError

__all__ = [
    "GENERATOR_PRESETS",
    "TOKENIZER_PRESETS",
    "Conditioning",
    "GeneratorConfig",
    "TextAttention",
    "TokenizerConfig",
    "TokenizerFamily",
    "default_ffn_dim",
]

Conditioning = Literal["class", "text"]
TextAttention = Literal["causal", "prefix"]
TokenizerFamily = Literal["vq", "ibq", "lfq"]


def default_ffn_dim(dim: int, multiple_of: int = 256) -> int:
    """Width of the SwiGLU hidden layer: ``int(8 * dim / 3)`` rounded up to a multiple of ``multiple_of``."""
    hidden = int(2 * (4 * dim) / 3)
    return -(-hidden // multiple_of) * multiple_of


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """An autoregressive image-token transformer.

    Attributes:
        dim: model width; ``dim = n_head * head_dim``.
        n_layer: number of transformer blocks.
        n_head: number of query heads.
        n_kv_head: number of key/value heads; divides ``n_head``. 0 means ``n_head``.
        ffn_dim: SwiGLU hidden width. 0 means :func:`default_ffn_dim`.
        vocab_size: number of image-token codes.
        block_size: image tokens per image, a perfect square ``grid_size ** 2``.
        conditioning: ``"class"`` (one label) or ``"text"`` (encoder states of a caption).
        cls_token_num: prefix length T: 1 for labels, the padded caption length for text.
        num_classes: number of labels; label ``num_classes`` is the unconditional one.
        has_uncond_class: whether the label table has the unconditional row.
        caption_dim: width of the text encoder's states (text only).
        text_attn: attention inside the text prefix: ``"causal"`` or ``"prefix"`` (bidirectional).
        n_double_stream_layers: leading blocks with projections of their own for text (GEAR text models).
        learned_uncond: LlamaGen's text models: a learned null caption instead of the encoder's empty string.
        rope_base: RoPE base frequency.
        norm_eps: epsilon of every RMSNorm.
    """

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int = 0
    ffn_dim: int = 0
    vocab_size: int = 16384
    block_size: int = 256
    conditioning: Conditioning = "class"
    cls_token_num: int = 1
    num_classes: int = 1000
    has_uncond_class: bool = True
    caption_dim: int = 0
    text_attn: TextAttention = "causal"
    n_double_stream_layers: int = 0
    learned_uncond: bool = False
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for field in ("dim", "n_layer", "n_head", "vocab_size", "block_size", "cls_token_num"):
            value = getattr(self, field)
            _require(isinstance(value, int) and not isinstance(value, bool), f"{field} must be an int, got {value!r}")
            _require(value >= 1, f"{field} must be at least 1, got {value}")
        if self.n_kv_head == 0:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if self.ffn_dim == 0:
            object.__setattr__(self, "ffn_dim", default_ffn_dim(self.dim))
        _require(self.dim % self.n_head == 0, f"dim {self.dim} is not divisible by n_head {self.n_head}")
        _require(self.head_dim % 4 == 0, f"head size {self.head_dim} (dim / n_head) must be a multiple of 4 (2-D RoPE)")
        _require(
            1 <= self.n_kv_head <= self.n_head and self.n_head % self.n_kv_head == 0,
            f"n_kv_head {self.n_kv_head} must divide n_head {self.n_head}",
        )
        _require(self.ffn_dim >= 1, f"ffn_dim must be at least 1, got {self.ffn_dim}")
        _require(
            self.grid_size**2 == self.block_size,
            f"block_size {self.block_size} is not a square: images are grid x grid tokens",
        )
        _require(
            self.conditioning in ("class", "text"), f"conditioning must be 'class' or 'text', got {self.conditioning!r}"
        )
        _require(
            self.text_attn in ("causal", "prefix"), f"text_attn must be 'causal' or 'prefix', got {self.text_attn!r}"
        )
        _require(
            math.isfinite(self.rope_base) and self.rope_base > 0, f"rope_base must be positive, got {self.rope_base}"
        )
        _require(math.isfinite(self.norm_eps) and self.norm_eps > 0, f"norm_eps must be positive, got {self.norm_eps}")
        if self.conditioning == "class":
            _require(self.num_classes >= 1, f"num_classes must be at least 1, got {self.num_classes}")
            _require(
                self.cls_token_num == 1, f"a class-conditional model has one prefix token, not {self.cls_token_num}"
            )
            _require(self.n_double_stream_layers == 0, "double-stream blocks need text conditioning")
            _require(not self.learned_uncond, "a learned null caption needs text conditioning")
        else:
            _require(self.caption_dim >= 1, f"a text model needs caption_dim >= 1, got {self.caption_dim}")
            _require(
                0 <= self.n_double_stream_layers <= self.n_layer,
                f"n_double_stream_layers {self.n_double_stream_layers} must lie in [0, n_layer = {self.n_layer}]",
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def grid_size(self) -> int:
        return math.isqrt(self.block_size)

    @property
    def kv_dim(self) -> int:
        """Width of the keys (or values) of one token: ``n_kv_head * head_dim``."""
        return self.n_kv_head * self.head_dim

    @property
    def qkv_dim(self) -> int:
        """Rows of ``wqkv``: ``[q (dim) | k (kv_dim) | v (kv_dim)]``."""
        return self.dim + 2 * self.kv_dim

    @property
    def max_seq_len(self) -> int:
        return self.cls_token_num + self.block_size

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> GeneratorConfig:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """An image tokenizer: encoder, quantizer, decoder.

    Attributes:
        family: ``"vq"`` (nearest code by L2, VQGAN coder), ``"ibq"`` (largest inner product, VQGAN coder),
            ``"lfq"`` (sign bits, MAGVIT2 coder; one or several groups).
        codebook_size: number of codes; for ``"lfq"`` ``2 ** codebook_embed_dim`` over all groups.
        codebook_embed_dim: width d of a code vector.
        z_channels: channels between encoder and ``quant_conv`` (vq, ibq); equal to d for lfq.
        ch, ch_mult, num_res_blocks: width, width multipliers per level and residual blocks per level.
        downsample: pixels per latent position along an edge. VQGAN: ``2 ** (len(ch_mult) - 1)``. MAGVIT2 keeps
            five levels and leaves out the last downsample (and first upsample) at 8.
        num_codebooks: groups of sign bits (lfq): indices per position.
        codebook_l2_norm: vq only: compare and decode L2-normalised vectors.
    """

    family: TokenizerFamily
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    z_channels: int = 256
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    downsample: int = 16
    num_codebooks: int = 1
    codebook_l2_norm: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        _require(self.family in ("vq", "ibq", "lfq"), f"family must be 'vq', 'ibq' or 'lfq', got {self.family!r}")
        for field in ("codebook_size", "codebook_embed_dim", "z_channels", "ch", "num_res_blocks", "num_codebooks"):
            _require(getattr(self, field) >= 1, f"{field} must be at least 1, got {getattr(self, field)}")
        _require(len(self.ch_mult) >= 1 and min(self.ch_mult) >= 1, f"ch_mult must be positive, got {self.ch_mult}")
        _require(self.ch % 32 == 0, f"ch {self.ch} must be a multiple of 32 (group norm has 32 groups)")
        levels = len(self.ch_mult) - 1
        if self.family == "lfq":
            _require(
                self.codebook_size == 2**self.codebook_embed_dim,
                f"codebook_size {self.codebook_size} must be 2 ** codebook_embed_dim = {2**self.codebook_embed_dim}",
            )
            _require(
                self.codebook_embed_dim % self.num_codebooks == 0,
                f"codebook_embed_dim {self.codebook_embed_dim} is not divisible by num_codebooks {self.num_codebooks}",
            )
            _require(
                self.downsample in (2**levels, 2 ** (levels - 1)),
                f"downsample {self.downsample} does not follow from {levels + 1} levels",
            )
        else:
            _require(self.num_codebooks == 1, f"{self.family} has one codebook, not {self.num_codebooks}")
            _require(self.downsample == 2**levels, f"downsample {self.downsample} is not 2 ** {levels} (ch_mult)")

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent grid of an image.

        Raises:
            ConfigError: an edge is not divisible by ``downsample``, or the lfq family would have a 1 x 1 latent, over
                which the variance that its adaptive norm takes is undefined.
        """
        for name, pixels in (("height", height), ("width", width)):
            _require(
                pixels >= self.downsample and pixels % self.downsample == 0,
                f"image {name} {pixels} is not a positive multiple of the tokenizer's downsample {self.downsample}",
            )
        _require(
            self.family != "lfq" or height * width > self.downsample**2,
            f"a {height} x {width} image has a 1 x 1 latent; {self.family} tokenizers need at least two positions",
        )
        return height // self.downsample, width // self.downsample

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> TokenizerConfig:
        return dataclasses.replace(self, **changes)


def _size(n_layer: int, n_head: int, dim: int) -> GeneratorConfig:
    return GeneratorConfig(n_layer=n_layer, n_head=n_head, dim=dim)


def _text(size: GeneratorConfig, **fields: Any) -> GeneratorConfig:
    double = max(1, round(size.n_layer / 3))
    return size.replace(
        conditioning="text", **{"cls_token_num": 300, "caption_dim": 2048, "n_double_stream_layers": double, **fields}
    )


_SIZES = {
    "S": _size(12, 12, 384),
    "B": _size(12, 12, 768),
    "L": _size(24, 16, 1024),
    "XL": _size(36, 20, 1280),
    "XXL": _size(48, 24, 1536),
    "XXXL": _size(48, 40, 2560),
}
_LLAMAGEN_TEXT = {"cls_token_num": 120, "n_double_stream_layers": 0, "learned_uncond": True}

#: Published generators. ``LlamaGen-*`` are class-conditional (GEAR and LlamaGen share them), ``GEAR-T2I-*`` are GEAR's
#: text models, ``GPT-*`` LlamaGen's text sizes (flan-t5-xl states, 2048 wide).
GENERATOR_PRESETS: dict[str, GeneratorConfig] = {
    **{f"LlamaGen-{name}": size for name, size in _SIZES.items()},
    **{f"GEAR-T2I-{name}": _text(size) for name, size in _SIZES.items()},
    "GEAR-T2I-1B": _text(_size(36, 20, 1440)),
    "GPT-XL": _text(_SIZES["XL"], **_LLAMAGEN_TEXT),
    "GPT-1B": _text(_size(22, 32, 2048), **_LLAMAGEN_TEXT),
    "GPT-3B": _text(_size(24, 32, 3200), **_LLAMAGEN_TEXT),
    "GPT-7B": _text(_size(32, 32, 4096), **_LLAMAGEN_TEXT),
}

#: Published tokenizers by name.
TOKENIZER_PRESETS: dict[str, TokenizerConfig] = {
    "VQ-16": TokenizerConfig(family="vq"),
    "VQ-8": TokenizerConfig(family="vq", ch_mult=(1, 2, 2, 4), downsample=8),
    "IBQ-16": TokenizerConfig(family="ibq", codebook_embed_dim=256, num_res_blocks=4, codebook_l2_norm=False),
    "LFQ-16": TokenizerConfig(
        family="lfq", codebook_embed_dim=14, z_channels=14, num_res_blocks=4, codebook_l2_norm=False
    ),
    "LFQ-8": TokenizerConfig(
        family="lfq",
        codebook_size=2**8,
        codebook_embed_dim=8,
        z_channels=8,
        num_res_blocks=4,
        downsample=8,
        codebook_l2_norm=False,
    ),
    "GLFQ-16": TokenizerConfig(
        family="lfq",
        codebook_size=2**32,
        codebook_embed_dim=32,
        z_channels=32,
        num_res_blocks=4,
        num_codebooks=4,
        codebook_l2_norm=False,
    ),
}
