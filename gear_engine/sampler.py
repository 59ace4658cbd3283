"""Where an image's randomness comes from, and the draw of one token per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from gear_engine.ops import GeneratorOps
from gear_engine.ops.sample_tokens import SamplingTable

__all__ = ["Noise", "PhiloxNoise", "TorchNoise"]


class Noise(Protocol):
    """A source of randomness."""

    def sample(
        self, ops: GeneratorOps, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor
    ) -> torch.Tensor:
        """One token per image, int64 (B,).

        Args:
            logits: fp32 (table.rows, V): conditional rows, then the unconditional ones.
            positions: int64 (B,): image-token index that is drawn.
        """
        ...


class TorchNoise:
    """The official order: per step one ``exponential_`` of shape (B, V) from a torch generator.

    That is what ``torch.multinomial`` draws, so the generator ends in the state that the official sampler leaves; a
    step that only takes argmaxes draws nothing.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator

    def sample(
        self, ops: GeneratorOps, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor
    ) -> torch.Tensor:
        noise = None
        if any(params.sample_logits for params in table.params):
            noise = torch.empty(len(table.params), logits.shape[1], device=logits.device)
            noise.exponential_(1, generator=self._generator)
        return ops.sample_tokens(logits, table, noise=noise)


class PhiloxNoise:
    """A counter-based stream per image, keyed (seed, position): see :mod:`gear_engine.ops.philox`."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._seeds = torch.tensor(seeds, dtype=torch.int64, device=device)

    def sample(
        self, ops: GeneratorOps, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor
    ) -> torch.Tensor:
        return ops.sample_tokens(logits, table, seeds=self._seeds, positions=positions)
