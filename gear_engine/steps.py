"""A scheduled batch through the model, one token per image: the buffers of one engine and what runs on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from gear_engine.config import GeneratorConfig
from gear_engine.cuda_graph import CaptureCost
from gear_engine.kv_cache import StaticKVCache
from gear_engine.models.condition import class_rows
from gear_engine.models.weights import GeneratorWeights
from gear_engine.ops import GeneratorOps
from gear_engine.prefixes import PrefixEncoder, prefix_labels
from gear_engine.rows import RowTensors
from gear_engine.runner import decode_step, prefill
from gear_engine.sampler import FiniteWatch, Noise
from gear_engine.scheduler import ScheduledBatch, ScheduledImage

__all__ = ["ProgressCallback", "StepCallback", "Steps", "TokensSoFar"]

#: A compiled call that makes several steps begins none after so many seconds: signals are seen between calls.
CALL_SECONDS: Final = 0.25

#: ``callback(step, total, tokens_so_far)``; tokens int32 (B, n), -1 where nothing is drawn yet.
StepCallback = Callable[[int, int, torch.Tensor], None]
#: ``progress(steps, total)``: so many of a call's steps are made; on a GPU, launched.
ProgressCallback = Callable[[int, int], None]


class Steps:
    """Runs batches on exactly their rows, by one call per op, or per several steps where there is an op for that.

    Attributes:
        cache: keys and values.
        tokens: int64 (num_slots + 1, max_tokens): the tokens drawn, by the slot of an image's conditional row. The last
            row belongs to no slot.
        watch: sees all logits.
    """

    def __init__(self, config: GeneratorConfig, ops: GeneratorOps, cache: StaticKVCache) -> None:
        self.config = config
        self.ops = ops
        self.cache = cache
        self.device = cache.device
        self.tokens = torch.zeros(cache.num_slots + 1, max(cache.max_tokens, 2), dtype=torch.int64, device=self.device)
        self.watch = FiniteWatch(self.device)
        self.prefixes = PrefixEncoder()
        self._rows: RowTensors | None = None

    def reset(self) -> None:
        """Forgets the rows; clears the cache if numbers in it may not be finite."""
        self._rows = None
        if self.watch.broken():
            # Entries that a mask hides are multiplied by a weight of 0, which does not hide a NaN.
            self.cache.clear()
            self.watch.clear()

    def unbind(self) -> None:
        """Lets go of the weights."""

    def prepare(self, weights: GeneratorWeights, *, with_noise: bool) -> None:
        """Prepares what later steps may need; ``with_noise``: under ``rng="torch"``."""

    @property
    def cost(self) -> CaptureCost:
        """Seconds and device memory that preparing has taken."""
        return CaptureCost()

    def prefill(self, weights: GeneratorWeights, batch: ScheduledBatch, noise: Noise | None) -> None:
        """Starts the images of ``batch``: their prefixes, and image token 0."""
        rows = self._row_tensors(batch, noise)
        logits = self._prefix_logits(weights, batch, rows)
        self._draw(rows, logits, torch.zeros_like(rows.cond_slots), 0)

    def decode(self, weights: GeneratorWeights, batch: ScheduledBatch, noise: Noise | None, limit: int) -> int:
        """The next tokens of every image of ``batch``; returns the number of steps made, at most ``limit``."""
        rows = self._row_tensors(batch, noise)
        positions = rows.positions(batch)  # [R], of the tokens to be drawn
        if self.ops.decode_steps is not None and (rows.noise.seeds is not None or self.ops.draws_as_torch):
            made, finite = self.ops.decode_steps(
                weights,
                self.cache,
                self.config.n_head,
                self.config.norm_eps,
                rows.slots,
                self.tokens,
                rows.cond_slots,
                positions[: len(batch.images)],
                rows.table,
                min(limit, batch.steps_alike),
                seeds=rows.noise.seeds,
                generator=rows.noise.generator,
                seconds=CALL_SECONDS,
            )
            self.watch.report(finite=finite)
            return made
        fed = positions - 1
        position = batch.images[0].drawn if rows.in_step else None
        # One column of the table is read and written several times faster than single entries of it.
        tokens = (
            self.tokens[rows.images, fed]
            if position is None
            else self.tokens[:, position - 1].index_select(0, rows.images)
        )
        logits = decode_step(
            weights,
            self.ops,
            self.cache,
            rows.slots,
            fed,
            tokens,
            first_slot=rows.first_slot,
            position=None if position is None else position - 1,
        )
        self._draw(rows, logits, positions[: len(batch.images)], position)
        return 1

    def _row_tensors(self, batch: ScheduledBatch, noise: Noise | None) -> RowTensors:
        if self._rows is None or self._rows.version != batch.version:
            self._rows = RowTensors.build(batch, noise, self.config.vocab_size, self.device)
        return self._rows

    def _prefix_logits(self, weights: GeneratorWeights, batch: ScheduledBatch, rows: RowTensors) -> torch.Tensor:
        """Logits (R, V) of image token 0."""
        if self.config.conditioning == "class":
            labels = torch.tensor(prefix_labels(batch, self.config.num_classes), device=self.device)
            return prefill(weights, self.ops, self.cache, rows.slots, class_rows(labels))
        guided = [image.uncond_slot is not None for image in batch.images]
        conditions = [image.condition for image in batch.images]
        state = self.prefixes.captions(weights, self.ops, conditions, guided)
        self.cache.write_prefix(rows.slots, state.values, state.bias)
        return state.logits

    def _draw(self, rows: RowTensors, logits: torch.Tensor, positions: torch.Tensor, position: int | None) -> None:
        """Draws and keeps the tokens at ``positions`` (B,), or all at ``position`` if that is one number."""
        drawn = rows.noise.sample(self.ops, logits, rows.table, positions)
        if position is None:
            self.tokens[rows.cond_slots, positions] = drawn
        else:
            self.tokens[:, position].index_copy_(0, rows.cond_slots, drawn)
        self.watch.see(logits)


class TokensSoFar:
    """The tokens of one call's images while they are drawn, copied on the device a step at a time.

    Args:
        out: int32 (B, n), where they go.
        tokens: the token table, see :class:`Steps`.
        row_of: request -> row of ``out``.
    """

    def __init__(self, out: torch.Tensor, tokens: torch.Tensor, row_of: Mapping[int, int]) -> None:
        self._out, self._tokens, self._row_of = out, tokens, row_of
        self._images: tuple[int, ...] = ()
        self._rows = self._slots = torch.empty(0, dtype=torch.int64)

    def update(self, running: Sequence[ScheduledImage]) -> None:
        """Copies the token drawn last of every image; a call's images are equally long, so they are in step."""
        if not running:
            return
        images = tuple(image.request_id for image in running)
        if images != self._images:
            rows, slots = [self._row_of[each] for each in images], [image.cond_slot for image in running]
            self._rows, self._slots = torch.tensor([rows, slots], device=self._out.device)
            self._images = images
        position = running[0].drawn - 1
        self._out[self._rows, position] = self._tokens[self._slots, position].to(torch.int32)
