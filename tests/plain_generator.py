"""The slow reference: a transformer with the official attribute names, its whole prefix kept in the cache.

It stands for a user's own module in the drop-in tests, and for the plain implementation in the prefix benchmark:
every prefix row is computed, stored and attended to, every mask is materialised, the unconditional rows run to the
end. Written from the model's definition; the torch draws follow the official order (one ``multinomial`` per step).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from gear_engine.config import GeneratorConfig


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: GeneratorConfig, double: bool) -> None:
        super().__init__()
        self.wqkv = nn.Linear(config.dim, config.qkv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        if double:
            self.wqkv_text = nn.Linear(config.dim, config.qkv_dim, bias=False)
            self.wo_text = nn.Linear(config.dim, config.dim, bias=False)
        self.kv_cache = None


class FeedForward(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: GeneratorConfig, double: bool) -> None:
        super().__init__()
        self.double = double
        self.attention = Attention(config, double)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        if double:
            self.attention_norm_text = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)


class LabelEmbedder(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + config.has_uncond_class, config.dim)


class CaptionEmbedder(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.cap_proj = nn.Module()
        self.cap_proj.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.cap_proj.fc2 = nn.Linear(config.dim, config.dim, bias=False)
        if config.learned_uncond:
            self.register_buffer("uncond_embedding", torch.randn(config.cls_token_num, config.caption_dim))


class PlainTransformer(nn.Module):
    """Attribute and parameter names of the official ``Transformer`` classes; random weights."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        names = ("dim", "n_layer", "n_head", "vocab_size", "block_size", "num_classes", "cls_token_num", "caption_dim")
        self.config = SimpleNamespace(
            **{name: getattr(config, name) for name in names},
            n_kv_head=config.n_kv_head if config.n_kv_head != config.n_head else None,
            rope_base=config.rope_base,
            norm_eps=config.norm_eps,
            text_attn=config.text_attn,
        )
        for name in ("vocab_size", "n_layer", "block_size", "num_classes", "cls_token_num"):
            setattr(self, name, getattr(config, name))
        text = config.conditioning == "text"
        self.cls_embedding = CaptionEmbedder(config) if text else LabelEmbedder(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i < config.n_double_stream_layers) for i in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.freqs_cis = rope_table(config)  # a plain attribute, as officially
        self.max_batch_size = -1
        self.max_seq_length = -1
        # Far from uniform logits, so that a wrong computation draws other tokens.
        nn.init.normal_(self.output.weight, std=2 * config.dim**-0.5)

    @property
    def head_dim(self) -> int:
        return self.config.dim // self.config.n_head

    @property
    def n_kv_head(self) -> int:
        return self.config.n_kv_head or self.config.n_head


def rope_table(config: GeneratorConfig) -> torch.Tensor:
    """(T + block_size, head_dim / 2, 2): cosines and sines; zeros, both of them, for the T prefix positions."""
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-2.0 * torch.arange(half // 2) / half)
    cells = torch.arange(config.block_size)
    angles = torch.cat(
        [torch.outer(cells // config.grid_size, frequencies), torch.outer(cells % config.grid_size, frequencies)], 1
    )
    return torch.cat([torch.zeros(config.cls_token_num, half, 2), torch.stack([angles.cos(), angles.sin()], -1)])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Interleaved pairs of x [B, S, H, D] by table [S, D / 2, 2]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table[None, :, None, :, 0], table[None, :, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


class PlainCache:
    """Keys and values of every position, the prefix rows included: [n_layer, 2, R, n_kv_head, T + n, head_dim]."""

    def __init__(self, model: PlainTransformer, rows: int, length: int) -> None:
        weight = model.tok_embeddings.weight
        shape = (model.n_layer, 2, rows, model.n_kv_head, length, model.head_dim)
        self.kv = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.mask = torch.ones(length, length, dtype=torch.bool, device=weight.device).tril().repeat(rows, 1, 1)

    def nbytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


def set_prefix_mask(cache: PlainCache, mask: torch.Tensor | None, prefix: int, text_attn: str) -> None:
    """Hide padded prefix columns (mask [R, T]) from everybody but themselves."""
    if text_attn == "prefix":
        cache.mask[:, :prefix, :prefix] = True
    if mask is not None:
        cache.mask[:, :, :prefix] &= mask.bool()[:, None]
    cache.mask |= torch.eye(cache.mask.shape[-1], dtype=torch.bool, device=cache.mask.device)


@torch.no_grad()
def plain_forward(
    model: PlainTransformer, h: torch.Tensor, positions: torch.Tensor, cache: PlainCache, *, text: bool
) -> torch.Tensor:
    """Rows h [R, S, dim] at ``positions`` [S] through all blocks; logits [R, V] of the last one, fp32."""
    rows, length, dim = h.shape
    kv_dim = model.n_kv_head * model.head_dim
    end = int(positions[-1]) + 1
    table = model.freqs_cis.to(h.device)[positions]
    for layer, block in enumerate(model.layers):
        suffix = "_text" if text and block.double else ""
        x = getattr(block, f"attention_norm{suffix}")(h)
        q, k, v = getattr(block.attention, f"wqkv{suffix}")(x).split([dim, kv_dim, kv_dim], -1)
        q, k, v = (t.view(rows, length, -1, model.head_dim) for t in (q, k, v))
        cache.kv[layer, 0][:, :, positions] = rotate(k, table).transpose(1, 2)
        cache.kv[layer, 1][:, :, positions] = v.transpose(1, 2)
        keys, values = (
            part[:, :, :end].repeat_interleave(model.config.n_head // model.n_kv_head, 1) for part in cache.kv[layer]
        )
        out = F.scaled_dot_product_attention(
            rotate(q, table).transpose(1, 2), keys, values, attn_mask=cache.mask[:, None, positions, :end]
        )
        h = h + getattr(block.attention, f"wo{suffix}")(out.transpose(1, 2).reshape(rows, length, dim))
        h = h + block.feed_forward(block.ffn_norm(h))
    return model.output(model.norm(h[:, -1])).float()


def embed_condition(model: PlainTransformer, condition: torch.Tensor) -> torch.Tensor:
    """Labels [R] or states [R, T, C] -> prefix rows [R, T, dim]."""
    if condition.ndim == 1:
        return model.cls_embedding.embedding_table(condition)[:, None]
    projection = model.cls_embedding.cap_proj
    return projection.fc2(F.gelu(projection.fc1(condition), approximate="tanh"))


def draw(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, sample_logits: bool) -> torch.Tensor:
    """Tokens [B] from logits [B, V]: temperature, top-k, top-p, then multinomial or argmax."""
    logits = logits / max(temperature, 1e-5)
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        logits = logits.masked_fill(
            torch.empty_like(logits, dtype=torch.bool).scatter_(1, index, before > top_p), -torch.inf
        )
    probs = logits.softmax(-1)
    return torch.multinomial(probs, 1)[:, 0] if sample_logits else probs.argmax(-1)


@torch.no_grad()
def plain_generate(
    model: PlainTransformer,
    condition: torch.Tensor,
    max_new_tokens: int,
    *,
    uncond: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    uncond_mask: torch.Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: float = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    on_step: Callable[[int, PlainCache], None] | None = None,
) -> torch.Tensor:
    """Tokens (B, n) int32 from torch's global generator; ``uncond`` is needed with guidance."""
    batch, prefix = len(condition), model.cls_token_num
    guided = cfg_scale > 1
    if guided:
        assert uncond is not None
        condition = torch.cat([condition, uncond])
        mask = None if mask is None or uncond_mask is None else torch.cat([mask, uncond_mask])
    cache = PlainCache(model, len(condition), prefix + max_new_tokens)
    set_prefix_mask(cache, mask, prefix, model.config.text_attn)
    h, positions, text = embed_condition(model, condition), torch.arange(prefix), condition.ndim == 3
    tokens: list[torch.Tensor] = []
    for step in range(max_new_tokens):
        logits = plain_forward(model, h, positions, cache, text=text)
        if guided:
            cond_logits, uncond_logits = logits.chunk(2)
            mix = step == 0 or cfg_interval <= -1 or step - 1 <= cfg_interval
            logits = uncond_logits + (cond_logits - uncond_logits) * cfg_scale if mix else cond_logits
        tokens.append(draw(logits, temperature, top_k, top_p, sample_logits))
        h = model.tok_embeddings(tokens[-1].repeat(2 if guided else 1))[:, None]
        positions, text = torch.tensor([prefix + step]), False
        if on_step is not None:
            on_step(step, cache)
    return torch.stack(tokens, 1).int().reshape(batch, max_new_tokens)
