"""The VQGAN coder: convolutional encoder and decoder of the VQ and IBQ tokenizers.

Residual blocks of GroupNorm(32), SiLU and 3x3 convolutions, a stride-2 convolution (encoder) or a nearest upsampling
and convolution (decoder) between levels, and single-head attention over the coarsest grid. Source: taming-transformers
as used by LlamaGen (VQ) and by TencentARC's IBQ. The two publish the same network under different parameter names;
:class:`CoderNames` holds the names, so that one implementation loads both kinds of state dict strictly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn as nn
import torch.nn.functional as F

from gear_engine.config import TokenizerConfig

__all__ = ["CODER_NAMES", "AttentionBlock", "CoderNames", "Decoder", "Encoder", "Level", "ResidualBlock"]

_GROUPS: Final = 32
_NORM_EPS: Final = 1e-6


@dataclass(frozen=True)
class CoderNames:
    """Parameter names of one publisher.

    Attributes:
        encoder_levels, decoder_levels: list of resolution levels.
        blocks: list of residual blocks inside a level.
        middle: the three modules between the levels and the latent.
        decoder_coarse_first: whether decoder level 0 is the coarsest one (else the finest).
    """

    encoder_levels: str
    decoder_levels: str
    blocks: str
    middle: tuple[str, str, str]
    decoder_coarse_first: bool


CODER_NAMES: Final = {
    "vq": CoderNames("conv_blocks", "conv_blocks", "res", ("0", "1", "2"), decoder_coarse_first=True),
    "ibq": CoderNames("down", "up", "block", ("block_1", "attn_1", "block_2"), decoder_coarse_first=False),
}


def attention_levels(config: TokenizerConfig) -> frozenset[int]:
    """Levels (0 = finest) with attention after each block: VQ the coarsest; IBQ the 16 x 16 grid of a 256 px image."""
    return frozenset({len(config.ch_mult) - 1 if config.family == "vq" else 4})


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=_NORM_EPS)


class ResidualBlock(nn.Module):
    """``shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))``; 1x1 shortcut if widths differ."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = self._modules.get("nin_shortcut")
        return x + h if shortcut is None else torch.add(shortcut(x), h)


class AttentionBlock(nn.Module):
    """``x + proj_out(attention(norm(x)))``: one head as wide as the channels, over all grid positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).transpose(1, 2).unsqueeze(1) for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H * W, C]
        h = h.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        projected: torch.Tensor = self.proj_out(h)
        return x + projected


class Downsample(nn.Module):
    """Halves the grid by a stride-2 3x3 convolution that is padded with zeros at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Doubles the grid: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if ``attention``, then ``resample``."""

    def __init__(
        self, blocks_name: str, widths: list[int], attention: bool, resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self._blocks_name = blocks_name
        pairs = itertools.pairwise(widths)
        self.add_module(blocks_name, nn.ModuleList(ResidualBlock(i, o) for i, o in pairs))
        self.attn = nn.ModuleList(AttentionBlock(width) for width in widths[1:] if attention)
        self._resample_name = None
        if resample is not None:
            self._resample_name, module = resample
            self.add_module(self._resample_name, module)

    def steps(self) -> list[nn.Module]:
        """The modules in the order in which they run."""
        blocks = list(self.get_submodule(self._blocks_name).children())
        steps = [s for pair in zip(blocks, self.attn, strict=True) for s in pair] if len(self.attn) else blocks
        return steps if self._resample_name is None else [*steps, self.get_submodule(self._resample_name)]


def _middle(names: CoderNames, channels: int) -> nn.Module:
    middle = nn.Module()
    parts = (ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))
    for name, part in zip(names.middle, parts, strict=True):
        middle.add_module(name, part)
    return middle


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> latent [B, z_channels, H / f, W / f], f = ``config.downsample``."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        names = CODER_NAMES[config.family]
        widths = [config.ch, *(config.ch * mult for mult in config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        levels = nn.ModuleList()
        for level in range(last + 1):
            inner = [widths[level]] + [widths[level + 1]] * config.num_res_blocks
            resample = ("downsample", Downsample(widths[level + 1])) if level < last else None
            levels.append(Level(names.blocks, inner, level in attention_levels(config), resample))
        self.add_module(names.encoder_levels, levels)
        self.mid = _middle(names, widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)
        self._levels_name = names.encoder_levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in self.get_submodule(self._levels_name).children():
            assert isinstance(level, Level)
            for step in level.steps():
                h = step(h)
        for step in self.mid.children():
            h = step(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latent [B, z_channels, h, w] -> image [B, 3, h f, w f], about [-1, 1]. Levels have one block more."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        names = CODER_NAMES[config.family]
        last = len(config.ch_mult) - 1
        width = config.ch * config.ch_mult[last]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = _middle(names, width)
        levels: list[Level] = []
        for level in range(last, -1, -1):
            out = config.ch * config.ch_mult[level]
            inner = [width] + [out] * (config.num_res_blocks + 1)
            resample = ("upsample", Upsample(out)) if level > 0 else None
            levels.append(Level(names.blocks, inner, level in attention_levels(config), resample))
            width = out
        if not names.decoder_coarse_first:
            levels.reverse()
        self.add_module(names.decoder_levels, nn.ModuleList(levels))
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        self._levels_name = names.decoder_levels
        self._coarse_first = names.decoder_coarse_first

    @property
    def last_layer(self) -> torch.Tensor:
        """Weight of the last convolution: what adaptive GAN losses take gradient norms of."""
        return self.conv_out.weight

    def steps(self) -> list[nn.Module]:
        """The modules between ``conv_in`` and ``norm_out`` in the order in which they run."""
        levels = list(self.get_submodule(self._levels_name).children())
        steps = list(self.mid.children())
        for level in levels if self._coarse_first else reversed(levels):
            assert isinstance(level, Level)
            steps += level.steps()
        return steps

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(z)
        for step in self.steps():
            h = step(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # type: ignore[no-any-return]
