"""Where an image's randomness comes from, and the draw of one token per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from gear_engine.ops import GeneratorOps
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams

__all__ = ["FiniteWatch", "Noise", "PhiloxNoise", "TorchNoise"]


class Noise(Protocol):
    """A source of randomness.

    Attributes:
        seeds: int64 (B,), of Philox; None: numbers come from ``generator``, and None there means the default one.
    """

    seeds: torch.Tensor | None
    generator: torch.Generator | None

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

    Attributes:
        generator: None means the device's default one.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self.seeds: torch.Tensor | None = None
        self.generator = generator

    def sample(
        self, ops: GeneratorOps, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor
    ) -> torch.Tensor:
        if table.params is None or any(params.sample_logits for params in table.params):
            noise = torch.empty(table.images, logits.shape[1], dtype=torch.float32, device=logits.device)
            ops.torch_exponential(noise, self.generator)
        else:
            noise = None
        return ops.sample_tokens(logits, table, noise=noise)

    def fill(self, ops: GeneratorOps, out: torch.Tensor, params: Sequence[SamplingParams]) -> None:
        """Draws one step's noise into ``out`` (B, V), contiguous; nothing if only argmaxes are taken."""
        if any(each.sample_logits for each in params):
            ops.torch_exponential(out, self.generator)


class PhiloxNoise:
    """A counter-based stream per image, keyed (seed, position): see :mod:`gear_engine.ops.philox`.

    Attributes:
        seeds: int64 (B,).
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds: torch.Tensor | None = torch.tensor(seeds, dtype=torch.int64, device=device)
        self.generator: torch.Generator | None = None

    def sample(
        self, ops: GeneratorOps, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor
    ) -> torch.Tensor:
        return ops.sample_tokens(logits, table, seeds=self.seeds, positions=positions)


class FiniteWatch:
    """Notices logits that are not finite in any row of any step, without waiting for the device at every step.

    A sum of finite fp32 logits is finite, and a sum that is not stays so. It has one place on the device, so that a
    captured step can add to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float32, device=device)
        self._host_sum = 0.0

    def see(self, logits: torch.Tensor, live: torch.Tensor | None = None) -> None:
        """Takes in one step's logits (R, V); only the rows that are ``live`` (bool (R,)), if that is given."""
        if live is None and logits.device.type == "cpu":
            # numpy's sum starts no threads. Those of torch's would go on spinning for milliseconds and take the cores
            # from the next step, whose kernels have threads of their own.
            with np.errstate(invalid="ignore", over="ignore"):
                self._host_sum += float(np.add.reduce(logits.numpy(), axis=None))
            return
        self._sum.add_(logits.sum() if live is None else logits.sum(dim=1).masked_fill(~live, 0.0).sum())

    def report(self, *, finite: bool) -> None:
        """Takes in steps whose logits somebody else has looked at."""
        if not finite:
            self._host_sum = math.nan

    def broken(self) -> bool:
        """Whether a number seen since :meth:`clear` was not finite; waits for the device."""
        return not math.isfinite(self._host_sum) or not math.isfinite(self._sum.item())

    def clear(self) -> None:
        self._sum.zero_()
        self._host_sum = 0.0
