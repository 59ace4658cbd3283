"""A small convolutional encoder for studies at small scale, trained on the run's own images by their labels.

It stands in for a pretrained encoder: its last feature map is the alignment target, the maps of all its levels give a
perceptual distance. What it knows is what tells the run's classes apart, and no more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gear_engine.checkpoint import strict
from gear_engine.errors import CheckpointError, ConfigError
from gear_engine.runs.world import World
from gear_engine.training.config import TrainConfig
from gear_engine.training.data import ImageSource, batches
from gear_engine.training.sections import EncoderConfig

__all__ = ["SmallEncoder", "read_small_encoder", "train_small_encoder"]

_GROUPS = 8


class _Level(nn.Module):
    """Halves the grid, then one residual block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(_GROUPS, out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(x)
        inner = self.conv1(F.silu(self.norm1(h)))
        out: torch.Tensor = h + self.conv2(F.silu(self.norm2(inner)))
        return out


class SmallEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> feature maps of ``log2(downsample)`` levels; class logits for its training.

    Attributes:
        dim: channels of the last map.
    """

    def __init__(self, width: int, downsample: int, num_classes: int) -> None:
        super().__init__()
        self.settings = {"width": width, "downsample": downsample, "num_classes": num_classes}
        count = int(math.log2(downsample))
        widths = [3] + [min(width, (width // 4) * 2**level) // _GROUPS * _GROUPS or _GROUPS for level in range(count)]
        widths[-1] = width
        self.dim = width
        self.levels = nn.ModuleList(_Level(i, o) for i, o in itertools.pairwise(widths))
        self.norm = nn.GroupNorm(_GROUPS, width)
        self.head = nn.Linear(width, num_classes)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The feature map of every level, finest first; the last one is normalised."""
        found = []
        h = images
        for level in self.levels:
            h = level(h)
            found.append(h)
        found[-1] = self.norm(h)
        return found

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """The last map as tokens in raster order, [B, h * w, dim]."""
        return self.maps(images)[-1].flatten(2).transpose(1, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits [B, num_classes]."""
        out: torch.Tensor = self.head(F.silu(self.maps(images)[-1]).mean(dim=(2, 3)))
        return out


def train_small_encoder(
    config: TrainConfig, source: ImageSource, device: torch.device, report: Callable[[dict[str, Any]], None]
) -> SmallEncoder:
    """A :class:`SmallEncoder` trained by cross-entropy on the labels, frozen.

    The same settings, seed and data give the same encoder, whatever the rest of the run is.

    Args:
        report: is given ``{"encoder_step", "encoder_loss", "encoder_accuracy"}`` a few times.
    """
    settings = config.encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = SmallEncoder(settings.width, config.tokenizer.downsample, len(source.class_names))
    encoder = encoder.to(device).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    size = min(settings.batch_size, len(source.labels))
    reading = config.replace(batch_size=size)
    every = max(1, settings.steps // 5)
    for step, batch in enumerate(batches(source, reading, World(), 0, settings.steps), start=1):
        labels = batch.labels.to(device)
        logits = encoder(batch.images.to(device).float() / 127.5 - 1.0)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == settings.steps:
            hits = (logits.argmax(dim=1) == labels).float().mean()
            report({"encoder_step": step, "encoder_loss": loss.item(), "encoder_accuracy": hits.item()})
    return encoder.eval().requires_grad_(False)


def read_small_encoder(stored: Any, settings: EncoderConfig, downsample: int, where: str) -> SmallEncoder:
    """The encoder in a checkpoint's ``encoder`` entry, ``{"settings", "state"}``, frozen.

    Raises:
        CheckpointError: there is none, or its tensors do not fit.
        ConfigError: it was trained for another grid or width.
    """
    if not isinstance(stored, dict) or set(stored) != {"settings", "state"}:
        raise CheckpointError(f"{where} holds no small encoder: train one (leave encoder.path out)")
    made = stored["settings"]
    if made.get("downsample") != downsample or made.get("width") != settings.width:
        raise ConfigError(
            f"the encoder in {where} has width {made.get('width')} and downsample {made.get('downsample')}; "
            f"this run wants {settings.width} and {downsample}"
        )
    encoder = SmallEncoder(**made)
    expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    strict.check_names_and_shapes(expected, stored["state"])
    encoder.load_state_dict(stored["state"])
    return encoder.eval().requires_grad_(False)
