"""Requests -> cache slots, and which images take part in the next step. Plain Python: it knows no device.

An image needs one slot for its conditional row and, as long as guidance mixes them in, one for its unconditional row.
Images are admitted in the order of their requests as soon as slots are free, at any step, and leave when their last
token is drawn. Sampling a batch offline is the case where all of them start together.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from gear_engine.errors import ConfigError
from gear_engine.request import SamplingParams

__all__ = ["ScheduledBatch", "ScheduledImage", "Scheduler"]


@dataclass(eq=False)
class ScheduledImage:
    """One image from its request to its last token.

    Attributes:
        request_id: unique, increasing.
        condition: what the image is conditioned on; the scheduler only carries it.
        params: sampling settings.
        seed: key of its random stream.
        total: image tokens to draw.
        drawn: image tokens drawn so far: 0 means that its prefill is still to come.
        cond_slot, uncond_slot: cache slots; the latter is None without guidance, or once it has ended.
    """

    request_id: int
    condition: Any
    params: SamplingParams
    seed: int
    total: int
    drawn: int = 0
    cond_slot: int = -1
    uncond_slot: int | None = None

    @property
    def guided(self) -> bool:
        """Whether the next token mixes in the unconditional logits."""
        return self.params.guided_at(self.drawn)

    @property
    def finished(self) -> bool:
        return self.drawn >= self.total

    @property
    def steps_alike(self) -> int:
        """Steps until this image's rows change: its last token is drawn, or its guidance ends."""
        left = self.total - self.drawn
        return int(min(left, self.params.guided_tokens - self.drawn)) if self.guided else left


@dataclass(frozen=True)
class ScheduledBatch:
    """Images that go through the model together: all at their prefill, or all in decoding.

    Rows are the conditional rows of the images in order, then the unconditional rows of the guided ones. ``version``
    changes whenever the rows do, so that index tensors can be kept from step to step.
    """

    images: tuple[ScheduledImage, ...]
    is_prefill: bool
    version: int
    slots: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        uncond = [image.uncond_slot for image in self.images if image.uncond_slot is not None]
        object.__setattr__(self, "slots", (*(image.cond_slot for image in self.images), *uncond))

    @property
    def steps_alike(self) -> int:
        """Steps until the rows change, if nobody joins."""
        return min(image.steps_alike for image in self.images)

    @property
    def first_slot(self) -> int | None:
        """The first slot, if the rows lie in consecutive slots."""
        first = self.slots[0]
        return first if self.slots == tuple(range(first, first + len(self.slots))) else None


class Scheduler:
    """Admits images into ``2 * max_images`` slots.

    Nothing is decided by clocks or randomness: the same calls give the same slots. A step that failed can be repeated:
    images advance only by :meth:`advance`.
    """

    def __init__(self, max_images: int) -> None:
        if not isinstance(max_images, int) or max_images < 1:
            raise ConfigError(f"max_images must be an int of at least 1, got {max_images!r}")
        self.max_images = max_images
        self._next_id = 0
        self._version = 0
        self.clear()

    def clear(self) -> None:
        """Drops every image, waiting or running."""
        self.waiting: deque[ScheduledImage] = deque()
        self.running: list[ScheduledImage] = []
        self._released: list[int] = []
        self._fresh = 0
        self._decoding: ScheduledBatch | None = None

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, condition: Any, params: SamplingParams, seed: int, total: int) -> ScheduledImage:
        """Queues an image of ``total`` tokens."""
        image = ScheduledImage(self._next_id, condition, params, seed, total)
        self._next_id += 1
        self.waiting.append(image)
        return image

    def schedule(self) -> list[ScheduledBatch]:
        """The batches of the next step: images in decoding, then newly admitted ones; none if all is done."""
        admitted = []
        while self.waiting and len(self.running) < self.max_images:
            image = self.waiting.popleft()
            self.running.append(image)
            admitted.append(image)
        # Conditional rows first: images that start together then fill consecutive slots in the order of their rows.
        for image in admitted:
            image.cond_slot = self._take_slot()
        for image in admitted:
            if image.guided:
                image.uncond_slot = self._take_slot()
        batches = []
        decoding = tuple(image for image in self.running if image.drawn > 0)
        if decoding:
            batches.append(self._decoding_batch(decoding))
        starting = tuple(image for image in self.running if image.drawn == 0)
        if starting:
            batches.append(self._batch(starting, is_prefill=True))
        return batches

    def _take_slot(self) -> int:
        """The lowest free slot. Two per image are enough: there are never more than ``max_images`` running."""
        if self._released:
            return heapq.heappop(self._released)
        self._fresh += 1
        return self._fresh - 1

    def _batch(self, images: tuple[ScheduledImage, ...], *, is_prefill: bool) -> ScheduledBatch:
        self._version += 1
        return ScheduledBatch(images, is_prefill, self._version)

    def _decoding_batch(self, images: tuple[ScheduledImage, ...]) -> ScheduledBatch:
        if self._decoding is None or self._decoding.images != images:
            self._decoding = self._batch(images, is_prefill=False)
        return self._decoding

    def advance(self, batch: ScheduledBatch, steps: int = 1) -> list[ScheduledImage]:
        """Counts ``steps`` drawn tokens for every image of ``batch``, whose rows stay the same meanwhile; returns the
        images that are finished, their slots freed."""
        finished = []
        for image in batch.images:
            image.drawn += steps
            if image.finished:
                self.running.remove(image)
                finished.append(image)
                heapq.heappush(self._released, image.cond_slot)
                self._release_uncond(image)
            elif not image.guided:
                self._release_uncond(image)
        return finished

    def _release_uncond(self, image: ScheduledImage) -> None:
        """Guidance has ended: the unconditional row leaves. The other rows stay where they are."""
        if image.uncond_slot is not None:
            heapq.heappush(self._released, image.uncond_slot)
            image.uncond_slot = None
            self._decoding = None
