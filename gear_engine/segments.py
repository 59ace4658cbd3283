"""What a captured step is replayed on, planned ahead without reading a token. Plain Python: it knows no device.

Images have no end token: when a row joins, loses its unconditional half or leaves follows from the requests alone. A
:class:`Segment` is a stretch of steps over the same rows. Between two segments the row table changes, and with the
number of rows maybe the bucket; the cache does not move.
"""

from __future__ import annotations

from dataclasses import dataclass

from gear_engine.request import SamplingParams
from gear_engine.scheduler import ScheduledBatch

__all__ = ["INERT", "Segment", "TableRow", "bucket_for", "buckets", "plan_segment"]

#: The slot of a row that takes no part.
INERT = -1


@dataclass(frozen=True)
class TableRow:
    """One row of a segment.

    Attributes:
        slot: the cache slot that it reads and writes.
        image_slot: the slot of its image's conditional row, where the image's tokens are kept; its own ``slot`` for
            the row that draws.
        position: image-token index of the token that it is fed in the segment's first step.
        partner: the row with the image's unconditional half, -1 without guidance and for unconditional rows.
        seed: key of the image's random stream.
        params: the image's settings.
    """

    slot: int
    image_slot: int
    position: int
    partner: int
    seed: int
    params: SamplingParams

    @property
    def draws(self) -> bool:
        return self.slot == self.image_slot


@dataclass(frozen=True)
class Segment:
    """``steps`` steps over the same rows.

    Attributes:
        bucket: rows of the program to run; those behind ``rows`` are inert.
        rows: the images' conditional rows in order, then the unconditional ones.
        images: number of conditional rows.
        steps: how often to run it.
    """

    bucket: int
    rows: tuple[TableRow, ...]
    images: int
    steps: int


def buckets(max_rows: int) -> tuple[int, ...]:
    """The row counts that are captured: powers of two, and ``max_rows``."""
    found = []
    size = 1
    while size < max_rows:
        found.append(size)
        size *= 2
    return (*found, max_rows)


def bucket_for(rows: int, max_rows: int) -> int:
    """The smallest bucket that holds ``rows`` rows."""
    return next(size for size in buckets(max_rows) if size >= rows)


def plan_segment(batch: ScheduledBatch, max_rows: int, limit: int) -> Segment:
    """The rows of a batch in decoding, and for how many steps, at most ``limit``, they stay as they are."""
    images = batch.images
    partners = []
    guided = len(images)
    for image in images:
        partners.append(-1 if image.uncond_slot is None else guided)
        guided += image.uncond_slot is not None
    rows = [
        TableRow(image.cond_slot, image.cond_slot, image.drawn - 1, partner, image.seed, image.params)
        for image, partner in zip(images, partners, strict=True)
    ]
    rows += [
        TableRow(image.uncond_slot, image.cond_slot, image.drawn - 1, -1, image.seed, image.params)
        for image in images
        if image.uncond_slot is not None
    ]
    return Segment(bucket_for(len(rows), max_rows), tuple(rows), len(images), min(limit, batch.steps_alike))
