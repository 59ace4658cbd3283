"""The PatchGAN discriminator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

__all__ = ["Discriminator"]

_GROUPS = 32


class Discriminator(nn.Module):
    """Images [B, 3, H, W] -> one logit per patch [B, 1, h, w]; 4x4 convolutions, LeakyReLU(0.2).

    ``num_layers`` stride-2 convolutions of width ``channels * min(2^n, 8)``, one of stride 1, one to a single channel;
    a norm after all but the first and the last. Source: Isola et al., pix2pix, with the parameter names and the
    initialisation (weights N(0, 0.02), norm weights N(1, 0.02)) of GEAR ``src/losses/discriminator.py``.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, norm: Literal["batch", "group"] = "batch") -> None:
        super().__init__()

        def normalise(width: int) -> nn.Module:
            return nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(min(_GROUPS, width), width)

        widths = [channels * min(2**n, 8) for n in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, num_layers + 1):
            stride = 2 if n < num_layers else 1
            conv = nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False)
            layers += [conv, normalise(widths[n]), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1.0, 0.02)
                module.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.main(images)
        return logits
