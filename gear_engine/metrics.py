"""How close images are to others: PSNR, SSIM, L1 pair by pair, the Fréchet distance of two sets; and codebook usage.

Images are uint8 tensors (peak 255) or floats in [0, 1] (peak 1), [B, H, W, C] or [B, C, H, W] alike for both operands;
computed in float64 per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from gear_engine.errors import InvalidRequestError

__all__ = ["CodebookUsage", "codebook_usage", "frechet_distance", "l1", "psnr", "ssim"]

_WINDOW: Final = 11
_SIGMA: Final = 1.5
_K1: Final = 0.01
_K2: Final = 0.03


def _pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Both operands in float64 and their peak value."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise InvalidRequestError(f"images must agree in shape and dtype: {a.dtype} {a.shape}, {b.dtype} {b.shape}")
    if a.ndim != 4 or a.numel() == 0:
        raise InvalidRequestError(f"images must have four axes and not be empty, got {tuple(a.shape)}")
    if a.dtype != torch.uint8 and not a.is_floating_point():
        raise InvalidRequestError(f"images must be uint8 or floats in [0, 1], got {a.dtype}")
    return a.double(), b.double(), 255.0 if a.dtype == torch.uint8 else 1.0


def l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference in units of the peak, float64 [B]."""
    x, y, peak = _pair(a, b)
    return (x - y).abs().flatten(1).mean(dim=1) / peak


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio ``10 log10(peak^2 / MSE)`` in dB, float64 [B]; infinite for equal images."""
    x, y, peak = _pair(a, b)
    mse = (x - y).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(peak**2 / mse)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity, float64 [B], at most 1.

    Wang et al. 2004: Gaussian window 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, population moments, only windows
    inside the image, averaged over positions and channels.

    Args:
        a, b: images whose smallest of the last three axes is the channels' (at most 4); edges of at least 11.
    """
    x, y, peak = _pair(a, b)
    if x.shape[1] > 4:
        x, y = x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)
    channels, height, width = x.shape[1:]
    if channels > 4 or min(height, width) < _WINDOW:
        raise InvalidRequestError(f"SSIM needs 1 to 4 channels and edges of at least {_WINDOW}, got {tuple(a.shape)}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()

    def smooth(image: torch.Tensor) -> torch.Tensor:
        rows = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        return F.conv2d(F.conv2d(image, rows, groups=channels), rows.transpose(2, 3), groups=channels)

    mean_x, mean_y = smooth(x), smooth(y)
    var_x = smooth(x * x) - mean_x * mean_x
    var_y = smooth(y * y) - mean_y * mean_y
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and unbiased covariance [D, D] in float64."""
    x = features.double()
    mean = x.mean(dim=0)
    centred = x - mean
    return mean, centred.T @ centred / (x.shape[0] - 1)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets of features.

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)`` with unbiased covariances S, in float64. The inner
    matrix is symmetric and positive semidefinite, so both roots come from symmetric eigenvalues (negative ones are
    rounding and count as 0): nothing becomes complex and singular covariances are fine. Source: Heusel et al. 2017,
    whose features are Inception's; the value means nothing apart from the features and the numbers of samples.

    Args:
        a, b: [N, D] and [M, D], at least two rows each.

    Raises:
        InvalidRequestError: other shapes, or values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(a.shape[0], b.shape[0]) < 2 or a.shape[1] < 1:
        raise InvalidRequestError(
            f"features must be [N, D] and [M, D], N and M > 1: {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise InvalidRequestError("features must be finite")
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = root @ cov_b @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance.clamp_min(0))


@dataclass(frozen=True)
class CodebookUsage:
    """How indices spread over a codebook.

    Attributes:
        num_codes: size of the codebook.
        num_used: codes that occur at least once.
        num_indices: indices counted.
        perplexity: ``exp(-sum p log p)`` of the empirical distribution p: the effective number of codes.
    """

    num_codes: int
    num_used: int
    num_indices: int
    perplexity: float

    @property
    def fraction(self) -> float:
        """Share of the codebook that occurs."""
        return self.num_used / self.num_codes


def codebook_usage(indices: torch.Tensor, num_codes: int) -> CodebookUsage:
    """:class:`CodebookUsage` of integer ``indices`` (any shape) in [0, num_codes).

    Raises:
        InvalidRequestError: no indices, or one out of range.
    """
    if indices.numel() == 0 or indices.is_floating_point():
        raise InvalidRequestError(f"codebook usage needs integer indices, got {indices.dtype} {tuple(indices.shape)}")
    if int(indices.min()) < 0 or int(indices.max()) >= num_codes:
        raise InvalidRequestError(f"indices must lie in [0, {num_codes}), got {int(indices.min())} .. {indices.max()}")
    _, counts = torch.unique(indices.flatten(), return_counts=True)
    p = counts.double() / counts.sum()
    perplexity = float(torch.exp(-(p * p.log()).sum()))
    return CodebookUsage(num_codes, counts.numel(), indices.numel(), perplexity)
