"""Weights by rule for the goldens: every parameter follows from its name and shape.

The rule: ``x = Generator(PCG64(crc32(name))).standard_normal(shape, float32)``; biases ``0.1 x``; other one-dimensional
parameters ``1 + 0.1 x``; embedding tables ``x``; everything else ``gain * x / sqrt(fan_in)`` with gain 2 for the output
head and 1 otherwise.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch


def golden_noise(tag: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal fp32 numbers seeded by the CRC-32 of ``tag``."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(tag.encode())))
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def golden_weight(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The parameter called ``name`` in the official state dict."""
    noise = golden_noise(name, shape)
    if len(shape) == 1:
        return 0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise
    if "embedding" in name:
        return noise
    gain = 2.0 if name == "output.weight" else 1.0
    # A numpy double, as in the rule: the division must round like the one that made the goldens.
    return torch.from_numpy((gain * noise.numpy() / math.sqrt(math.prod(shape[1:]))).astype(np.float32))


def golden_state_dict(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict for ``module`` whose parameters follow the rule."""
    return {name: golden_weight(name, tensor.shape) for name, tensor in module.state_dict().items()}


def golden_index(goldens_dir: Path) -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = json.loads((goldens_dir / "index.json").read_text())
    return index


def load_golden(goldens_dir: Path, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(goldens_dir / f"{name}.safetensors")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``max|a - b| / max|b|``, the measure in which the goldens are equal."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max())
