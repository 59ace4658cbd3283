"""Image metrics against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gear_engine.errors import InvalidRequestError
from gear_engine.metrics import codebook_usage, frechet_distance, l1, psnr, ssim


def test_psnr_and_l1_of_a_known_difference() -> None:
    a = torch.full((2, 4, 5, 3), 100, dtype=torch.uint8)
    b = a.clone()
    b[0] += 10
    assert psnr(a, b)[0].item() == pytest.approx(10 * math.log10(255**2 / 100))
    assert math.isinf(psnr(a, b)[1])
    assert l1(a, b).tolist() == pytest.approx([10 / 255, 0.0])
    assert psnr(a / 255, b / 255)[0].item() == pytest.approx(psnr(a, b)[0].item())


def _slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One channel, window by window, straight from the paper."""
    grid = np.arange(11) - 5
    kernel = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (kernel * x).sum(), (kernel * y).sum()
            vx, vy = (kernel * (x - mx) ** 2).sum(), (kernel * (y - my) ** 2).sum()
            cov = (kernel * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_matches_the_definition_window_by_window() -> None:
    a = torch.randint(0, 256, (2, 13, 16, 3), dtype=torch.uint8)
    b = (a.int() + torch.randint(-40, 40, a.shape)).clamp(0, 255).to(torch.uint8)
    expected = [
        np.mean([_slow_ssim(x[..., c].double().numpy(), y[..., c].double().numpy()) for c in range(3)])
        for x, y in zip(a, b, strict=True)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-9)
    channels_first = ssim(a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2))
    assert channels_first.tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0])


def test_codebook_usage() -> None:
    usage = codebook_usage(torch.tensor([[0, 0, 3], [3, 5, 5]]), 8)
    assert (usage.num_used, usage.num_indices, usage.fraction) == (3, 6, 3 / 8)
    assert usage.perplexity == pytest.approx(3.0)
    assert codebook_usage(torch.zeros(7, dtype=torch.int64), 8).perplexity == pytest.approx(1.0)


def test_bad_input_is_refused() -> None:
    image = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(InvalidRequestError, match="shape"):
        psnr(image, image[:, :8])
    with pytest.raises(InvalidRequestError, match="uint8 or floats"):
        l1(image.int(), image.int())
    with pytest.raises(InvalidRequestError, match="at least 11"):
        ssim(image[:, :8], image[:, :8])
    with pytest.raises(InvalidRequestError, match="lie in"):
        codebook_usage(torch.tensor([8]), 8)
    with pytest.raises(InvalidRequestError, match="integer"):
        codebook_usage(torch.tensor([0.5]), 8)


def test_frechet_distance_of_known_gaussians() -> None:
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(5, 5)))[0]
    raw = random.normal(size=(4000, 5))
    raw = (raw - raw.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T  # exactly mean 0, covariance 1
    scales_a, scales_b, shift = np.array([1.0, 2.0, 0.5, 0.0, 3.0]), np.array([1.0, 1.0, 0.5, 0.1, 0.0]), np.arange(5.0)
    a, b = (raw * scales_a) @ basis, (raw * scales_b) @ basis + shift
    # Covariances that commute: |shift|^2 + sum (s_a - s_b)^2, singular ones included.
    expected = float((shift**2).sum() + ((scales_a - scales_b) ** 2).sum())
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_when_covariances_do_not_commute() -> None:
    a = torch.from_numpy(np.random.default_rng(1).normal(size=(50, 3)) * [1, 2, 3])
    b = torch.from_numpy(np.random.default_rng(2).normal(size=(60, 3)) @ np.array([[1, 2, 0], [0, 1, 1], [1, 0, 1.0]]))
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0)  # of a product that is not symmetric
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    expected = float(means + cov_a.trace() + cov_b.trace() - 2 * values.sqrt().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_refuses() -> None:
    rows = torch.zeros(4, 3)
    for a, b in ((rows, torch.zeros(4, 2)), (rows[:1], rows), (rows, rows[0]), (rows, rows + math.nan)):
        with pytest.raises(InvalidRequestError):
            frechet_distance(a, b)
