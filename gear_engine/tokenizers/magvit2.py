"""The MAGVIT2 coder: convolutional encoder and decoder of the lookup-free (LFQ, GLFQ) tokenizers.

Residual blocks without convolution biases; the encoder halves the grid by stride-2 convolutions, the decoder doubles it
by depth-to-space, and before each decoder level an adaptive group norm takes its scale and shift from the latent's
per-channel standard deviation and mean. Source: Open-MAGVIT2 (SEED-Voken) as used by GEAR. At downsample 8 the last
downsampling and the first upsampling are left out and every block stays.
"""

from __future__ import annotations

import itertools
import math
from typing import Final

import torch
import torch.nn as nn
import torch.nn.functional as F

from gear_engine.config import TokenizerConfig

__all__ = ["AdaptiveGroupNorm", "Decoder", "Encoder", "ResidualBlock", "Upsampler"]

_GROUPS: Final = 32
_NORM_EPS: Final = 1e-6


class ResidualBlock(nn.Module):
    """``shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`` without biases; 1x1 shortcut if widths differ."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, in_channels, eps=_NORM_EPS)
        self.norm2 = nn.GroupNorm(_GROUPS, out_channels, eps=_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = self._modules.get("nin_shortcut")
        return h + x if shortcut is None else torch.add(h, shortcut(x))


def depth_to_space(x: torch.Tensor) -> torch.Tensor:
    """[B, 4 C, H, W] -> [B, C, 2 H, 2 W]; input channel (2 dy + dx) C + c lands at offset (dy, dx) of its block."""
    batch, channels, height, width = x.shape
    x = x.view(batch, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, channels // 4, 2 * height, 2 * width)


class Upsampler(nn.Module):
    """Doubles the grid: a 3x3 convolution to four times the channels, then :func:`depth_to_space`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return depth_to_space(self.conv1(x))


class AdaptiveGroupNorm(nn.Module):
    """``gamma(std) * group_norm(x) + beta(mean)``, std (unbiased variance + eps) and mean over the latent's grid.

    The unbiased variance of a 1 x 1 latent is undefined: callers refuse that size.
    """

    def __init__(self, z_channels: int, channels: int) -> None:
        super().__init__()
        self.gn = nn.GroupNorm(_GROUPS, channels, eps=_NORM_EPS, affine=False)
        self.gamma = nn.Linear(z_channels, channels)
        self.beta = nn.Linear(z_channels, channels)

    def affine(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, shift), each [B, C, 1, 1]."""
        flat = latent.flatten(2)  # [B, z_channels, h * w]
        scale = self.gamma((flat.var(dim=-1) + _NORM_EPS).sqrt())
        shift = self.beta(flat.mean(dim=-1))
        return scale[:, :, None, None], shift[:, :, None, None]

    def forward(self, x: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        scale, shift = self.affine(latent)
        return torch.addcmul(shift, scale, self.gn(x))


class Level(nn.Module):
    """``block``: the residual blocks of one resolution; ``downsample`` or ``upsample`` where there is one."""

    def __init__(self, widths: list[int], resample: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(i, o) for i, o in itertools.pairwise(widths))
        self._resample_name = None
        if resample is not None:
            self._resample_name, module = resample
            self.add_module(self._resample_name, module)

    def steps(self) -> list[nn.Module]:
        """The modules in the order in which they run."""
        steps = list(self.block)
        return steps if self._resample_name is None else [*steps, self.get_submodule(self._resample_name)]


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> latent [B, z_channels, H / f, W / f], f = ``config.downsample``."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.ch, *(config.ch * mult for mult in config.ch_mult)]
        num_resamples = int(math.log2(config.downsample))
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for level in range(len(config.ch_mult)):
            out = widths[level + 1]
            conv = ("downsample", nn.Conv2d(out, out, 3, stride=2, padding=1)) if level < num_resamples else None
            self.down.append(Level([widths[level]] + [out] * config.num_res_blocks, conv))
        self.mid_block = nn.ModuleList(ResidualBlock(widths[-1], widths[-1]) for _ in range(config.num_res_blocks))
        self.norm_out = nn.GroupNorm(_GROUPS, widths[-1], eps=_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in self.down:
            assert isinstance(level, Level)
            for step in level.steps():
                h = step(h)
        for step in self.mid_block:
            h = step(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latent [B, z_channels, h, w] -> image [B, 3, h f, w f], about [-1, 1]. Level 0 is the finest and runs last."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        num_resamples = int(math.log2(config.downsample))
        width = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid_block = nn.ModuleList(ResidualBlock(width, width) for _ in range(config.num_res_blocks))
        levels, norms = [], []
        for level in range(len(config.ch_mult) - 1, -1, -1):
            out = config.ch * config.ch_mult[level]
            norms.append(AdaptiveGroupNorm(config.z_channels, width))
            resample = ("upsample", Upsampler(out)) if 0 < level <= num_resamples else None
            levels.append(Level([width] + [out] * config.num_res_blocks, resample))
            width = out
        self.up = nn.ModuleList(reversed(levels))
        self.adaptive = nn.ModuleList(reversed(norms))
        self.norm_out = nn.GroupNorm(_GROUPS, width, eps=_NORM_EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    @property
    def last_layer(self) -> torch.Tensor:
        """Weight of the last convolution: what adaptive GAN losses take gradient norms of."""
        return self.conv_out.weight

    def steps(self) -> list[nn.Module]:
        """The modules between ``conv_in`` and ``norm_out`` in the order in which they run."""
        steps = list(self.mid_block)
        for norm, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            assert isinstance(level, Level)
            steps += [norm, *level.steps()]
        return steps

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(z)
        for step in self.steps():
            h = step(h, z) if isinstance(step, AdaptiveGroupNorm) else step(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # type: ignore[no-any-return]
