"""A scheduled batch as index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.sampler import Noise, PhiloxNoise
from gear_engine.scheduler import ScheduledBatch

__all__ = ["RowTensors"]


@dataclass(frozen=True)
class RowTensors:
    """The rows of a batch, kept from step to step while they stay the same.

    Attributes:
        version: of the batch that this was built for.
        slots: int64 (R,): cache slot of every row.
        images: int64 (R,): conditional slot of the row's image, where its tokens are.
        cond_slots: int64 (B,).
        drawn: int64 (R,): tokens drawn when this was built.
        since: the first image's number of drawn tokens then.
        in_step: all images had drawn equally many: they have one position.
        first_slot: the first slot, if the slots are consecutive.
        table, noise: the images' settings and randomness.
    """

    version: int
    slots: torch.Tensor
    images: torch.Tensor
    cond_slots: torch.Tensor
    drawn: torch.Tensor
    since: int
    in_step: bool
    first_slot: int | None
    table: SamplingTable
    noise: Noise

    @classmethod
    def build(cls, batch: ScheduledBatch, noise: Noise | None, vocab_size: int, device: torch.device) -> RowTensors:
        """``noise`` None means Philox with the images' seeds."""
        images = batch.images
        guided = [image.uncond_slot is not None for image in images]
        owners = (*images, *(image for image in images if image.uncond_slot is not None))

        def index(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            version=batch.version,
            slots=index(batch.slots),
            images=index([image.cond_slot for image in owners]),
            cond_slots=index([image.cond_slot for image in images]),
            drawn=index([image.drawn for image in owners]),
            since=images[0].drawn,
            in_step=all(image.drawn == images[0].drawn for image in images),
            first_slot=batch.first_slot,
            table=SamplingTable.build([image.params for image in images], guided, vocab_size, device),
            noise=PhiloxNoise([image.seed for image in images], device) if noise is None else noise,
        )

    def positions(self, batch: ScheduledBatch) -> torch.Tensor:
        """int64 (R,): index of the token that each row's image draws next."""
        return self.drawn + (batch.images[0].drawn - self.since)
