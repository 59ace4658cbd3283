"""Where an image's randomness comes from, and the draw of one token per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from gear_engine.ops import GeneratorOps
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams

__all__ = ["FiniteWatch", "Noise", "PhiloxNoise", "TorchNoise"]


class Noise(Protocol):
    """A source of randomness."""

    def begin(self, table: SamplingTable, vocab_size: int, device: torch.device) -> None:
        """Announces a step before its logits are computed: what does not depend on them may begin."""
        ...

    def sample(
        self, ops: GeneratorOps, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor
    ) -> torch.Tensor:
        """One token per image, int64 (B,).

        Args:
            logits: fp32 (table.rows, V): conditional rows, then the unconditional ones.
            positions: int64 (B,): image-token index that is drawn.
        """
        ...


def _draws(table: SamplingTable) -> bool:
    return table.params is None or any(params.sample_logits for params in table.params)


class TorchNoise:
    """The official order: per step one ``exponential_`` of shape (B, V) from a torch generator.

    That is what ``torch.multinomial`` draws, so the generator ends in the state that the official sampler leaves; a
    step that only takes argmaxes draws nothing.

    The draw is serial, a third of a millisecond per image on a CPU, and does not depend on the logits: after
    :meth:`begin` it runs on a thread of its own beside the model's step. No draw is begun for a step that may not come,
    so between steps the generator is where the official sampler would have it.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator
        self._thread: ThreadPoolExecutor | None = None
        self._begun: Future[torch.Tensor] | None = None

    def begin(self, table: SamplingTable, vocab_size: int, device: torch.device) -> None:
        if device.type != "cpu" or self._begun is not None or not _draws(table):
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="gear_engine-noise")
        self._begun = self._thread.submit(self._draw, table.images, vocab_size, device)

    def _draw(self, images: int, vocab_size: int, device: torch.device) -> torch.Tensor:
        return torch.empty(images, vocab_size, device=device).exponential_(1, generator=self._generator)

    def sample(
        self, ops: GeneratorOps, logits: torch.Tensor, table: SamplingTable, positions: torch.Tensor
    ) -> torch.Tensor:
        noise = None
        if self._begun is not None:
            begun, self._begun = self._begun, None
            noise = begun.result()
        elif _draws(table):
            noise = self._draw(table.images, logits.shape[1], logits.device)
        return ops.sample_tokens(logits, table, noise=noise)

    def fill(self, out: torch.Tensor, params: Sequence[SamplingParams]) -> None:
        """Draws one step's noise into ``out`` (B, V), contiguous; nothing if only argmaxes are taken."""
        if any(each.sample_logits for each in params):
            out.exponential_(1, generator=self._generator)

    def close(self) -> None:
        """Returns when no draw is under way: from then on the generator moves no more. A step that failed counts."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = self._begun = None


class PhiloxNoise:
    """A counter-based stream per image, keyed (seed, position): see :mod:`gear_engine.ops.philox`.

    Attributes:
        seeds: int64 (B,).
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)

    def begin(self, table: SamplingTable, vocab_size: int, device: torch.device) -> None:
        """Nothing: the noise is made where it is used."""

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
        self._sum = torch.zeros((), device=device)
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
