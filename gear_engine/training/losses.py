"""The losses of the recipe. Source: Tencent-Hunyuan/GEAR ``src/losses/losses.py`` and ``src/train_gear.py``."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

__all__ = [
    "QuantizerLosses",
    "adaptive_weight",
    "alignment_loss",
    "hinge_loss",
    "lecam_loss",
    "quantizer_losses",
    "reconstruction_loss",
    "spatial_norm",
]

_NORM_EPS = 1e-6
_ADAPTIVE_EPS, _ADAPTIVE_MAX = 1e-4, 1e4


def reconstruction_loss(images: torch.Tensor, restored: torch.Tensor, kind: Literal["l1", "l2"]) -> torch.Tensor:
    """Mean absolute or squared difference, a scalar."""
    return F.l1_loss(images, restored) if kind == "l1" else F.mse_loss(images, restored)


class QuantizerLosses(NamedTuple):
    """Scalars: the codebook term, the commitment, the weighted entropy term and its two unweighted parts."""

    codebook: torch.Tensor
    commitment: torch.Tensor
    entropy: torch.Tensor
    sample_entropy: torch.Tensor
    average_entropy: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.codebook + self.commitment + self.entropy


def quantizer_losses(diff: tuple[object, ...], like: torch.Tensor) -> QuantizerLosses:
    """What a tokenizer returns as ``diff`` in training mode, with zeros for the terms that its family lacks."""
    zero = like.new_zeros(())

    def scalar(value: object) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else zero

    entropy = diff[2] if isinstance(diff[2], tuple) else (None, None, None)
    return QuantizerLosses(scalar(diff[0]), scalar(diff[1]), *(scalar(term) for term in entropy))


def hinge_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """``(mean relu(1 - real) + mean relu(1 + fake)) / 2``."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def lecam_loss(real: torch.Tensor, fake: torch.Tensor, averages: torch.Tensor) -> torch.Tensor:
    """LeCam regularisation: ``relu(real - avg_fake)^2 + relu(avg_real - fake)^2`` of mean logits.

    Args:
        real, fake: mean logits, scalars.
        averages: [2], running means of the real and of the fake logits.
    """
    return F.relu(real - averages[1]).square() + F.relu(averages[0] - fake).square()


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
    """``|d reconstruction / d layer| / (|d adversarial / d layer| + 1e-4)``, at most 1e4, without a gradient.

    Source: Esser et al., VQGAN. GEAR itself keeps the weight constant.
    """
    (wanted,) = torch.autograd.grad(reconstruction, layer, retain_graph=True)
    (found,) = torch.autograd.grad(adversarial, layer, retain_graph=True)
    ratio: torch.Tensor = torch.linalg.vector_norm(wanted) / (torch.linalg.vector_norm(found) + _ADAPTIVE_EPS)
    return ratio.clamp(0.0, _ADAPTIVE_MAX).detach()


def alignment_loss(projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """REPA: mean over images and tokens of ``-cos(projected, target)``; both [B, L, D]."""
    return -(F.normalize(projected, dim=-1) * F.normalize(target, dim=-1)).sum(dim=-1).mean()


def spatial_norm(z: torch.Tensor, mode: Literal["none", "demean", "zscore"], alpha: float) -> torch.Tensor:
    """Targets [B, L, D] normalised per image and channel over the grid.

    ``"demean"``: ``z - alpha * mean``; ``"zscore"``: that over ``std + 1e-6``, std (unbiased) of the result.
    """
    if mode == "none":
        return z
    z = z - alpha * z.mean(dim=1, keepdim=True)
    return z if mode == "demean" else z / (z.std(dim=1, keepdim=True) + _NORM_EPS)
