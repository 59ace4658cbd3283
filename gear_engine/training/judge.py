"""A judge of samples: a small classifier, trained on its own draw of images, that no training run ever sees.

Its accuracy on held-out images says how far it can be trusted, its opinion of samples gives their class accuracy, and
its penultimate features a Fréchet distance (:func:`gear_engine.metrics.frechet_distance`).
"""

from __future__ import annotations

import itertools
from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Judge", "accuracy", "train_judge"]

_FEATURES: Final = 64
_BATCH: Final = 64
_BLOCK: Final = 256


class Judge(nn.Module):
    """Four stride-2 convolutions with batch norm, 64 features, class logits. Architecture unlike the small encoder's.

    Args:
        num_classes: labels.
        size: edge of the images in pixels, a multiple of 16.
    """

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (3, 16, 32, 64, 64)
        for i, o in itertools.pairwise(widths):
            layers += [nn.Conv2d(i, o, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * (size // 16) ** 2, _FEATURES))
        self.head = nn.Linear(_FEATURES, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits [B, num_classes] and features [B, 64] of uint8 images [B, 3, H, W]."""
        features = self.body(images.to(self.head.weight.dtype) / 127.5 - 1.0)
        return self.head(F.relu(features)), features

    @torch.no_grad()
    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`forward` in blocks, in eval mode, for many images."""
        self.eval()
        parts = [self(block) for block in images.split(_BLOCK)]
        return torch.cat([logits for logits, _ in parts]), torch.cat([features for _, features in parts])


def train_judge(
    images: torch.Tensor, labels: torch.Tensor, num_classes: int, *, seed: int, epochs: int, learning_rate: float = 2e-3
) -> Judge:
    """A judge trained by cross-entropy (AdamW, one cosine), in eval mode; torch's global generators are untouched.

    Args:
        images: uint8 [N, 3, H, W]. labels: int64 [N].
        seed: of the weights and of the order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(num_classes, images.shape[-1]).train()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.01)
    batches = len(images) // _BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=order)[: batches * _BATCH].split(_BATCH):
            logits, _ = judge(images[rows])
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def accuracy(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of uint8 images [N, 3, H, W] whose class is ``labels`` [N] in the judge's eyes."""
    return float((judge.look(images)[0].argmax(dim=1) == labels).double().mean())
