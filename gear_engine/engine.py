"""The engine: requests in, image tokens out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from gear_engine import memory
from gear_engine.cuda_graph import CaptureCost, on_device
from gear_engine.errors import ConfigError, InvalidRequestError, NumericalError
from gear_engine.kv_cache import CacheDtype, StaticKVCache, resolve_cache_dtype
from gear_engine.models.condition import Condition
from gear_engine.models.transformer import Transformer, weights_of
from gear_engine.models.weights import GeneratorWeights
from gear_engine.ops import GeneratorOps
from gear_engine.ops.skinny_linear import PackKind
from gear_engine.prefixes import caption_condition, check_conditions
from gear_engine.request import ImageRequest, RngMode, SamplingParams, check_length, check_source
from gear_engine.sampler import Noise, TorchNoise
from gear_engine.scheduler import ScheduledBatch, Scheduler
from gear_engine.step_program import Execution, make_steps, resolve_execution
from gear_engine.steps import ProgressCallback, StepCallback, TokensSoFar

__all__ = ["Engine", "FinishedImage"]

_LOWER = "lower max_images, or choose a smaller dtype"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FinishedImage:
    """All tokens of one request.

    Attributes:
        request_id: what :meth:`Engine.add_request` returned.
        tokens: int32 (n,), on the engine's device.
    """

    request_id: int
    tokens: torch.Tensor


class Engine:
    """Draws image tokens with one generator: fixed slots in a static cache, every image with its own settings.

    Args:
        generator: a :class:`Transformer` in eval mode, or weights. They are read in place and never written; a later
            change of the parameters shows (call :meth:`invalidate` then: unconditional captions are kept).
        max_images: images in flight at once; more requests wait.
        dtype: compute and cache dtype; None means the weights'. Another dtype, or strides, copies the weights.
        backend: one backend name for all ops, or a name per op; see :mod:`gear_engine.ops.backends`.
        max_new_tokens: the longest request; None means the model's ``block_size``.
        weight_format: pack the linear weights (a copy): ``"bf16"``, or ``"int8"`` with one scale per output row. None
            packs only where that changes no number: bfloat16 on the compiled CPU kernels.
        memory_budget: bytes that the engine may allocate; None means what the device has available.
        execution: how decode steps run, see :mod:`gear_engine.step_program`; no choice changes a token.
        cache_dtype: of keys and values; None means ``dtype``. ``"fp8"`` (``torch.float8_e4m3fn``) takes half of bf16's
            memory and changes tokens; see :class:`StaticKVCache`.

    Raises:
        ConfigError: the module is in training mode, or a number is out of range.
        BackendUnavailableError: a backend cannot run here.
        OutOfMemoryError: weights and cache do not fit; nothing was allocated. Later calls raise it if the device runs
            out all the same; the engine works on.
    """

    def __init__(
        self,
        generator: Transformer | GeneratorWeights,
        *,
        max_images: int = 8,
        dtype: torch.dtype | None = None,
        backend: str | Mapping[str, str] = "auto",
        max_new_tokens: int | None = None,
        weight_format: PackKind | None = None,
        memory_budget: int | None = None,
        execution: Execution = "auto",
        cache_dtype: CacheDtype | None = None,
    ) -> None:
        weights = weights_of(generator)
        config = self.config = weights.config
        self.dtype = weights.dtype if dtype is None else dtype
        self.device = weights.device
        if self.dtype not in _DTYPES:
            raise ConfigError(f"an engine computes in float32, bfloat16 or float16, not in {self.dtype}")
        stored = self._cache_dtype = resolve_cache_dtype(cache_dtype, self.dtype)
        self.max_new_tokens = config.block_size if max_new_tokens is None else max_new_tokens
        if not (isinstance(self.max_new_tokens, int) and 1 <= self.max_new_tokens <= config.block_size):
            raise ConfigError(f"max_new_tokens {max_new_tokens} must lie in [1, block_size = {config.block_size}]")
        self.max_images = max_images
        self.scheduler = Scheduler(max_images)
        self.ops = GeneratorOps.resolve(self.device, self.dtype, backend, stored)
        if weight_format is None and (self.dtype, self.ops.backends["skinny_linear"]) == (torch.bfloat16, "cpu"):
            weight_format = "bf16"
        self.weight_format = weight_format
        self.execution = resolve_execution(execution, self.ops, self.device)
        self._memory_budget = memory_budget
        self._check_fits(weights)
        self._weights: GeneratorWeights | None = None
        with on_device(self.device), memory.out_of_memory_is_typed(_LOWER):
            self.cache = StaticKVCache(config, 2 * max_images, self.max_new_tokens, stored, self.device)
            self._steps = make_steps(self.execution, config, self.ops, self.cache)
        self._tokens = self._steps.tokens
        self.bind(weights)
        self.reset()

    def _check_fits(self, weights: GeneratorWeights) -> None:
        """Raises OutOfMemoryError, with the number of images that would fit, before anything is allocated."""
        budget = self._memory_budget
        memory.check_engine_fits(
            self.config,
            memory.available_bytes(self.device) if budget is None else budget,
            self.max_images,
            dtype=self.dtype,
            cache_dtype=self._cache_dtype,
            max_tokens=self.max_new_tokens,
            weight_bytes=weights.nbytes_as(self.dtype, self.weight_format),
            graphs=self.execution == "graph",
        )

    def bind(self, generator: Transformer | GeneratorWeights | None) -> None:
        """Reads other weights of the same architecture from now on; None lets go of the present ones.

        Raises ConfigError if the architecture differs or images are in flight, OutOfMemoryError if a copy is too large.
        """
        if self.scheduler.num_unfinished:
            raise ConfigError(f"{self.scheduler.num_unfinished} images are in flight: finish or reset() first")
        self.invalidate()
        self._steps.unbind()
        self._weights = None
        if generator is not None:
            weights = weights_of(generator)
            if weights.config != self.config:
                raise ConfigError(f"the engine was built for {self.config}, not for {weights.config}")
            if self._memory_budget is not None:
                self._check_fits(weights)
            copied = weights.nbytes_as(self.dtype, self.weight_format)
            memory.check_fits({"weights": copied}, memory.available_bytes(self.device), "choose a smaller dtype")
            with memory.out_of_memory_is_typed("choose a smaller dtype"):
                self._weights = weights.to(self.device, self.dtype, self.weight_format)

    def invalidate(self) -> None:
        """Forgets what was computed from the weights: to be called when they have changed in place.
        Copied weights (another dtype, or packed) are read again by :meth:`bind` only."""
        self._steps.prefixes.forget()

    def warm_up(self, rng: RngMode = "philox") -> None:
        """Prepares what many later calls gain from: where decoding runs by programs, every bucket is captured now;
        OutOfMemoryError if the graphs do not fit. On a CPU weights that are read in place move into large pages, a few
        seconds per gigabyte (:mod:`gear_engine.pages`).
        """
        with self._at_work():
            self.weights.collapse()
            self._steps.prepare(self.weights, with_noise=rng == "torch")

    @property
    def capture_cost(self) -> CaptureCost:
        """Seconds and device memory that captured graphs have taken so far."""
        return self._steps.cost

    def reset(self) -> None:
        """Drops every request, waiting or in flight."""
        self.scheduler.clear()
        self._finished: list[FinishedImage] = []
        with on_device(self.device):
            self._steps.reset()

    @property
    def weights(self) -> GeneratorWeights:
        if self._weights is None:
            raise ConfigError("the engine holds no weights: bind() some first")
        return self._weights

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or are in flight."""
        return self.scheduler.num_unfinished

    def add_request(self, request: ImageRequest, *, rng: RngMode = "philox") -> int:
        """Queues one image, which starts as soon as a slot is free; returns its number.

        Raises:
            InvalidRequestError: the request does not fit the model, or ``rng`` is ``"torch"``, whose draws are one
                stream for a whole batch: only :meth:`generate` can follow its order.
        """
        if rng != "philox":
            raise InvalidRequestError(f"rng={rng!r} draws for whole batches in step: use generate(), or rng='philox'")
        total = check_length(request.max_new_tokens, self.max_new_tokens)
        condition = caption_condition(request) if request.label is None else [request.label]
        (checked,), _ = check_conditions(condition, request.params, self.config)
        return self.scheduler.add(checked, request.params, request.seed, total).request_id

    def generate(
        self,
        condition: Condition | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        rng: RngMode = "philox",
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        max_new_tokens: int | None = None,
        callback: StepCallback | None = None,
        progress: ProgressCallback | None = None,
    ) -> torch.Tensor:
        """Tokens of B images.

        Args:
            condition: int64 labels (B,) (tensor or sequence), or a :class:`TextCondition` of B captions.
            params: settings of all images, or one per image; None means the defaults.
            rng: ``"philox"``: any B, images wait for slots. ``"torch"``: B <= max_images, all images in step, noise
                drawn from ``generator`` in the official order.
            seeds: Philox only: one per image; None means 0 ... B - 1.
            generator: torch only; None means the global one of the engine's device. Others may not use it meanwhile.
            max_new_tokens: tokens per image; None means the engine's maximum.
            callback: called after every step, so that steps are made one at a time, and sees the tokens; an exception
                of its drops this batch and leaves the engine usable.
            progress: called whenever the engine looks up: after some steps, as many as it makes without.

        Returns:
            int32 (B, max_new_tokens) on the engine's device.

        Raises:
            InvalidRequestError: an argument is out of range, or other requests are in flight.
            NumericalError: the model's logits are not finite.
        """
        total = check_length(max_new_tokens, self.max_new_tokens)
        conditions, every = check_conditions(condition, params, self.config)
        batch = len(conditions)
        drawn_on = None if generator is None else generator.device.type
        keys = check_source(rng, batch, self.max_images, seeds, drawn_on, self.device.type)
        if self.num_unfinished:
            raise InvalidRequestError(f"{self.num_unfinished} requests are in flight: step() until they are done")
        noise = TorchNoise(generator) if rng == "torch" else None
        with memory.out_of_memory_is_typed(_LOWER):
            out = torch.full((batch, total), -1, dtype=torch.int32, device=self.device)
        try:
            images = [self.scheduler.add(*each, total) for each in zip(conditions, every, keys, strict=True)]
            row_of = {image.request_id: row for row, image in enumerate(images)}
            so_far = TokensSoFar(out, self._tokens, row_of)
            steps = -(-batch // self.max_images) * total
            done = 0
            while self.num_unfinished:
                for finished in self._step(noise, 1 if callback is not None else total):
                    out[row_of[finished.request_id]] = finished.tokens
                    done += 1
                # All images are equally long: they come in waves, each in step.
                running = self.scheduler.running
                made = -(-done // self.max_images) * total + (running[0].drawn if running else 0)
                if callback is not None:
                    so_far.update(running)
                    callback(made - 1, steps, out)
                if progress is not None:
                    progress(made, steps)
        finally:
            # Nothing is left after a complete run; after an exception the unfinished images go.
            self.reset()
        return out

    def step(self) -> list[FinishedImage]:
        """One token for every image in flight; returns the images that are complete.

        After an exception (an interrupt, say) the next call repeats what was not finished.
        """
        return self._step(None)

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Around everything that launches work: kernels and events belong to the engine's device."""
        autocast = torch.autocast(self.device.type, enabled=False)
        with on_device(self.device), memory.out_of_memory_is_typed(_LOWER), torch.inference_mode(), autocast:
            yield

    def _step(self, noise: Noise | None, limit: int = 1) -> list[FinishedImage]:
        """Up to ``limit`` tokens for every image in flight, as long as nobody joins or leaves."""
        with self._at_work():
            batches = self.scheduler.schedule()
            for batch in batches:
                if batch.is_prefill:
                    self._steps.prefill(self.weights, batch, noise)
                    self._advance(batch, 1)
                else:
                    # Images that start now join the others in the next step.
                    alike = limit if len(batches) == 1 else 1
                    self._advance(batch, self._steps.decode(self.weights, batch, noise, alike))
        finished, self._finished = self._finished, []
        return finished

    def _advance(self, batch: ScheduledBatch, steps: int) -> None:
        """Counts the drawn tokens; images that are complete leave."""
        if any(image.drawn + steps == image.total for image in batch.images) and self._steps.watch.broken():
            self.reset()
            raise NumericalError(f"the model's logits are not finite in {self.dtype}; try float32 or other weights")
        for image in self.scheduler.advance(batch, steps):
            # Drawn inside inference mode; a clone made outside can be used by autograd.
            with torch.inference_mode(False):
                drawn = self._tokens[image.cond_slot, : image.total].to(torch.int32)
                self._finished.append(FinishedImage(image.request_id, drawn))
