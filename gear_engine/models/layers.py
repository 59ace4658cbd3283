"""The generator's layers as modules, for training and teacher forcing; named by the checkpoint's keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gear_engine.config import GeneratorConfig
from gear_engine.ops.decode_attention import rotate
from gear_engine.ops.skinny_linear import rms_norm

__all__ = ["Attention", "CaptionEmbedder", "FeedForward", "LabelEmbedder", "RMSNorm", "TransformerBlock"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps)`` in fp32 (float64 for float64), rounded to x's dtype, times ``weight`` (dim,)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1(x)) * w3(x))``."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Attention(nn.Module):
    """Attention over a whole sequence: T prefix tokens, then image tokens.

    In a double-stream block prefix tokens have projections of their own; all tokens attend together.
    """

    def __init__(self, config: GeneratorConfig, *, double_stream: bool) -> None:
        super().__init__()
        self.config = config
        self.wqkv = nn.Linear(config.dim, config.qkv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        if double_stream:
            self.wqkv_text = nn.Linear(config.dim, config.qkv_dim, bias=False)
            self.wo_text = nn.Linear(config.dim, config.dim, bias=False)
        self.double_stream = double_stream

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x: (B, S, dim), normed; rope: (S, head_dim / 2, 2); mask: bool (B, 1, S, S), None for causal."""
        config = self.config
        prefix = config.cls_token_num
        batch, length, _ = x.shape
        if self.double_stream:
            qkv = torch.cat((self.wqkv_text(x[:, :prefix]), self.wqkv(x[:, prefix:])), dim=1)
        else:
            qkv = self.wqkv(x)
        heads = [config.n_head, config.n_kv_head, config.n_kv_head]
        q, k, v = torch.split(qkv.view(batch, length, -1, config.head_dim), heads, dim=2)  # [B, S, H, D]
        q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, S, D]
        shared = config.n_kv_head != config.n_head
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
        out = out.transpose(1, 2).flatten(2)  # [B, S, dim]
        if self.double_stream:
            return torch.cat((self.wo_text(out[:, :prefix]), self.wo(out[:, prefix:])), dim=1)
        projected: torch.Tensor = self.wo(out)
        return projected


class TransformerBlock(nn.Module):
    """``h += attention(attention_norm(h)); h += feed_forward(ffn_norm(h))``."""

    def __init__(self, config: GeneratorConfig, *, double_stream: bool) -> None:
        super().__init__()
        self.attention = Attention(config, double_stream=double_stream)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        if double_stream:
            self.attention_norm_text = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.double_stream = double_stream
        self.prefix = config.cls_token_num

    def forward(self, h: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.double_stream:
            text, image = h[:, : self.prefix], h[:, self.prefix :]
            normed = torch.cat((self.attention_norm_text(text), self.attention_norm(image)), dim=1)
        else:
            normed = self.attention_norm(h)
        h = h + self.attention(normed, rope, mask)
        out: torch.Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


class LabelEmbedder(nn.Module):
    """Class labels to prefix tokens: (B,) -> (B, 1, dim). The last row is the unconditional class."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + config.has_uncond_class, config.dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.embedding_table(labels).unsqueeze(1)
        return out


class CaptionProjection(nn.Module):
    """``fc2(gelu_tanh(fc1(x)))``."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class CaptionEmbedder(nn.Module):
    """Text-encoder states to prefix tokens: (B, T, caption_dim) -> (B, T, dim)."""

    uncond_embedding: torch.Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        if config.learned_uncond:
            # A buffer that holds a parameter, as in the official module: in the state dict, and trainable.
            null_caption = torch.randn(config.cls_token_num, config.caption_dim) / config.caption_dim**0.5
            self.register_buffer("uncond_embedding", nn.Parameter(null_caption))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.cap_proj(states)
        return out
