"""Perceptual distances between images."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from gear_engine.errors import CheckpointError, MissingWeightsError
from gear_engine.training.small_encoder import SmallEncoder

__all__ = ["Lpips", "PerceptualLoss", "SmallPerceptual", "load_lpips"]

#: Widths of VGG-16's convolutions; 0 is a max-pooling. Features are taken before each of them and at the end.
_VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10


class PerceptualLoss(Protocol):
    """A distance of images [B, 3, H, W] in [-1, 1], differentiable in both: a scalar."""

    def __call__(self, images: torch.Tensor, restored: torch.Tensor) -> torch.Tensor: ...


def _unit(x: torch.Tensor) -> torch.Tensor:
    # A vector of zeros has no direction; vector_norm's gradient there is zero, a square root's would be infinite.
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / (length + _EPS)


class SmallPerceptual:
    """Mean squared difference of channel-normalised feature maps of a :class:`SmallEncoder`, averaged over its levels.

    Per level the squared differences are summed over channels, as LPIPS with weights of 1 does.
    """

    def __init__(self, encoder: SmallEncoder) -> None:
        self._encoder = encoder

    def __call__(self, images: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self._encoder.maps(images)
        found = self._encoder.maps(restored)
        parts = [(_unit(a) - _unit(b)).square().sum(dim=1).mean() for a, b in zip(wanted, found, strict=True)]
        return torch.stack(parts).mean()


class Lpips(nn.Module):
    """LPIPS with VGG-16: ``sum_l mean_hw w_l . (unit(f_l(x)) - unit(f_l(y)))^2``, averaged over images.

    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric; as used by GEAR
    ``src/losses/lpips.py`` (images in [-1, 1], linear weights of version 0.1 without dropout).
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        self._taps: list[int] = []
        for out in _VGG:
            if out == 0:
                self._taps.append(len(layers))
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
        self.features = nn.Sequential(*layers)
        self.weights = nn.ParameterList(torch.zeros(n) for n in (64, 128, 256, 512, 512))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        h = (images - self.shift) / self.scale
        found = []
        for number, layer in enumerate(self.features):
            if number in self._taps:
                found.append(h)
            h = layer(h)
        return [*found, h]

    def forward(self, images: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self._maps(images)
        total = restored.new_zeros(())
        for a, b, weight in zip(wanted, self._maps(restored), self.weights, strict=True):
            squared = (_unit(a) - _unit(b)).square()
            total = total + torch.einsum("bchw,c->bhw", squared, weight).mean()
        return total


def load_lpips(vgg: str, linear: str) -> Lpips:
    """:class:`Lpips` from torchvision's ``vgg16-397923af.pth`` and LPIPS's ``vgg.pth`` (``lin0.model.1.weight`` …).

    Raises:
        MissingWeightsError: a file is not there.
        CheckpointError: a file lacks tensors of these names and shapes.
    """
    for name, path in (("loss.lpips_vgg", vgg), ("loss.lpips_linear", linear)):
        if not path or not Path(path).is_file():
            raise MissingWeightsError(
                f"{name} {path!r} is not there. LPIPS needs torchvision's vgg16-397923af.pth and the vgg.pth of LPIPS "
                "0.1; give both paths, or set loss.perceptual to 'encoder' or 'none'"
            )
    net = Lpips()
    backbone, heads = _tensors(vgg), _tensors(linear)
    try:
        net.features.load_state_dict(
            {name.removeprefix("features."): t for name, t in backbone.items() if name.startswith("features.")}
        )
        with torch.no_grad():
            for level, weight in enumerate(net.weights):
                weight.copy_(heads[f"lin{level}.model.1.weight"].view(-1))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{vgg} and {linear} are not the weights of LPIPS with VGG-16: {error}") from error
    return net.eval().requires_grad_(False)


def _tensors(path: str) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"cannot read {path} as weights: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not named tensors")
    return found
