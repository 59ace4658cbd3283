"""Encoders whose patch features hidden states are aligned with (REPA targets)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from gear_engine.errors import MissingWeightsError
from gear_engine.training.sections import EncoderConfig
from gear_engine.training.small_encoder import SmallEncoder

__all__ = ["Dinov2Targets", "SmallTargets", "TargetEncoder"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PATCH = 14


class TargetEncoder(Protocol):
    """What the alignment needs of an encoder.

    Attributes:
        dim: width D of a feature.
    """

    dim: int

    def targets(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images [B, 3, H, W], one per token of the generator's grid: [B, L, D], no gradient."""
        ...


class SmallTargets:
    """Features of the run's own :class:`SmallEncoder`."""

    def __init__(self, encoder: SmallEncoder) -> None:
        self.encoder, self.dim = encoder, encoder.dim

    @torch.no_grad()
    def targets(self, images: torch.Tensor) -> torch.Tensor:
        dtype = self.encoder.head.weight.dtype
        return self.encoder.tokens(images.to(dtype) / 127.5 - 1.0)


class Dinov2Targets:
    """DINOv2's patch features through transformers.

    Images are normalised by ImageNet's moments and resized (bicubic) to 14 pixels per token; position embeddings are
    resampled to the grid once. Source: GEAR ``src/repa_encoders/dinov2.py``.
    """

    def __init__(self, settings: EncoderConfig, grid: int, device: torch.device) -> None:
        path = Path(settings.path)
        if not settings.path or not (path / "config.json").is_file():
            raise MissingWeightsError(
                f"encoder.path {settings.path!r} is no folder of DINOv2 weights (config.json and model.safetensors, as "
                "transformers saves them, for example dinov2-base); download one, or set encoder.kind = 'small' for a "
                "small study"
            )
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise MissingWeightsError("DINOv2 needs transformers: pip install transformers") from error
        model: Any = Dinov2Model
        self._model = model.from_pretrained(path, local_files_only=True)
        self._model.eval().requires_grad_(False)
        self.layer, self.dim = settings.layer, int(self._model.config.hidden_size)
        blocks = int(self._model.config.num_hidden_layers)
        if self.layer > blocks:
            raise MissingWeightsError(f"encoder.layer {self.layer} is beyond the {blocks} blocks of {path}")
        self._pixels = grid * _PATCH
        self._model.config.image_size = self._pixels
        embeddings = self._model.embeddings
        embeddings.position_embeddings = torch.nn.Parameter(
            _resample(embeddings.position_embeddings.detach(), grid), requires_grad=False
        )
        self._model.to(device)
        self._mean = torch.tensor(_MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(_STD, device=device).view(1, 3, 1, 1)

    @torch.no_grad()
    def targets(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.float() / 255.0 - self._mean) / self._std
        x = F.interpolate(x, self._pixels, mode="bicubic")
        out = self._model(x, output_hidden_states=self.layer != -1)
        tokens: torch.Tensor = out.last_hidden_state if self.layer == -1 else out.hidden_states[self.layer]
        return tokens[:, 1:]


def _resample(embeddings: torch.Tensor, grid: int) -> torch.Tensor:
    """Position embeddings [1, 1 + n * n, D] for a grid x grid image, antialiased bicubic; the class token's is kept."""
    first, rest = embeddings[:, :1], embeddings[:, 1:]
    side = round(rest.shape[1] ** 0.5)
    if side == grid:
        return embeddings
    image = rest.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat((first, image.permute(0, 2, 3, 1).flatten(1, 2).to(first.dtype)), dim=1)
