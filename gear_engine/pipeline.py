"""Labels or captions in, images out: a generator, a tokenizer and, for prompts, a text encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from gear_engine import pipeline_inputs as inputs
from gear_engine.checkpoint import open_generator, open_tokenizer, save_pretrained
from gear_engine.engine import Engine
from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.kv_cache import CacheDtype, resolve_cache_dtype
from gear_engine.models.condition import TextCondition
from gear_engine.models.transformer import Transformer
from gear_engine.ops.skinny_linear import PackKind
from gear_engine.pipeline_output import Decoding, OutputType, PipelineOutput
from gear_engine.request import SamplingParams
from gear_engine.text_encoders import CaptionFeatures, TextEncoder, load_text_encoder
from gear_engine.tokenizers import Decoder, DeviceDecoder, Tokenizer, choose_decoder

__all__ = ["OutputType", "Pipeline", "PipelineOutput"]

#: ``callback(pipe, step, position, {"tokens": ...})`` after every step; its answer is ignored.
StepCallback = Callable[["Pipeline", int, int, dict[str, torch.Tensor]], Any]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Pipeline:
    """A model ready to draw images.

    Args:
        generator: the autoregressive model.
        tokenizer: decodes its tokens; its codebook must be the generator's vocabulary.
        text_encoder: turns prompts into states (text models); not needed for labels or precomputed states.
        dtype: the generator's compute dtype; None: its weights' own.
        backend: kernels to use: one name, or a name per op; see ``gear-engine info``.
        weight_format: ``"bf16"`` or ``"int8"`` packs the generator's linear weights; see :class:`Engine`.
        cache_dtype: ``"fp8"`` keeps keys and values in half of bf16's memory and changes tokens; see :class:`Engine`.
        decode_dtype: arithmetic of the decoding convolutions, over an fp32 tokenizer: ``torch.bfloat16`` is faster, at
            45 dB and better against fp32. None: the tokenizer's own dtype. On a GPU an fp32 tokenizer decodes by a
            captured step, beside the drawing of the next images (:func:`gear_engine.tokenizers.choose_decoder`).
        max_images: images sampled at a time; a larger call is split or queued.
        decode_batch: images decoded at a time.
        memory_budget: bytes that sampling may take; None: what the device has left.

    Raises:
        ConfigError: the models do not fit each other, or a cache cannot hold ``cache_dtype``.
    """

    def __init__(
        self,
        generator: Transformer,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder | None = None,
        *,
        dtype: torch.dtype | None = None,
        backend: str | Mapping[str, str] = "auto",
        weight_format: PackKind | None = None,
        cache_dtype: CacheDtype | None = None,
        decode_dtype: torch.dtype | None = None,
        max_images: int = 8,
        decode_batch: int = 8,
        memory_budget: int | None = None,
    ) -> None:
        resolve_cache_dtype(cache_dtype, generator.tok_embeddings.weight.dtype if dtype is None else dtype)
        inputs.check_fit(generator, tokenizer, text_encoder)
        if max_images < 1 or decode_batch < 1:
            raise ConfigError(f"max_images {max_images} and decode_batch {decode_batch} must be at least 1")
        self.generator = generator.eval()
        self.tokenizer = tokenizer.eval()
        self.text_encoder = text_encoder
        self._options = {"dtype": dtype, "backend": backend, "weight_format": weight_format, "cache_dtype": cache_dtype}
        self.max_images, self.decode_batch, self.memory_budget = max_images, decode_batch, memory_budget
        self._decode_dtype, self._backend = decode_dtype, backend
        self._decoder = self._choose_decoder()
        self._engine: Engine | None = None
        self._empty_caption: CaptionFeatures | None = None
        self._trained_with: str | None = None
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        *,
        text_encoder: str | os.PathLike[str] | TextEncoder | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokenizer_dtype: torch.dtype | None = None,
        ema: bool = True,
        backend: str | Mapping[str, str] = "auto",
        weight_format: PackKind | None = None,
        cache_dtype: CacheDtype | None = None,
        decode_dtype: torch.dtype | None = None,
        max_images: int = 8,
        decode_batch: int = 8,
        memory_budget: int | None = None,
        **overrides: Any,
    ) -> Pipeline:
        """Opens a checkpoint of any published format, a converted folder, or ``org/name@revision`` on the hub.

        Args:
            path: the generator's file or folder; the tokenizer may be in it, or be named by it.
            tokenizer: the tokenizer's file, where ``path`` does not lead to it, or a tokenizer.
            text_encoder: folder or ``org/name@revision`` of a Qwen3 or T5 encoder (the ``t2i`` extra), opened in the
                training's precision, or an encoder.
            device: where the models go; CPU by default.
            dtype: the generator's; None keeps the file's.
            tokenizer_dtype: the tokenizer's; None keeps the file's.
            ema: EMA weights where the file has them.
            **overrides: what the file does not say, such as ``image_size=384``; see
                :class:`gear_engine.checkpoint.GeneratorOverrides` and ``TokenizerOverrides``.

        Raises:
            CheckpointError: a file is unreadable, incomplete or of another architecture.
            ConfigError: an override or ``cache_dtype`` is unknown, or the models do not fit each other.
        """
        if dtype is not None or isinstance(cache_dtype, str):
            resolve_cache_dtype(cache_dtype, dtype or torch.float32)
        for_generator, for_tokenizer = inputs.split_overrides(overrides)
        generator, _ = open_generator(path, device, dtype, ema=ema, **for_generator)
        if not isinstance(tokenizer, Tokenizer):
            source = path if tokenizer is None else tokenizer
            tokenizer, _ = open_tokenizer(source, device, tokenizer_dtype, ema=ema, **for_tokenizer)
        trained_with, precision = inputs.trained_text_encoder(path, generator.config)
        if text_encoder is not None and not isinstance(text_encoder, TextEncoder):
            length, encoder_dtype = generator.config.cls_token_num, _DTYPES[precision]
            text_encoder = load_text_encoder(text_encoder, max_length=length, device=device, dtype=encoder_dtype)
        pipe = cls(
            generator,
            tokenizer,
            text_encoder,
            backend=backend,
            weight_format=weight_format,
            cache_dtype=cache_dtype,
            decode_dtype=decode_dtype,
            max_images=max_images,
            decode_batch=decode_batch,
            memory_budget=memory_budget,
        )
        pipe._trained_with = trained_with
        return pipe

    def save_pretrained(self, folder: str | os.PathLike[str], *, force: bool = False) -> None:
        """Writes generator and tokenizer to a folder (config.json, safetensors) for :meth:`from_pretrained`.

        The text encoder is not written: it is somebody else's model.

        Raises:
            CheckpointError: the folder is not empty and ``force`` is not given.
        """
        save_pretrained(folder, self.generator, self.tokenizer, force=force)

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    @property
    def image_size(self) -> int:
        """Edge of the images in pixels."""
        return self.generator.config.grid_size * self.tokenizer.config.downsample

    def _choose_decoder(self) -> Decoder | DeviceDecoder | None:
        return choose_decoder(self.tokenizer, self._decode_dtype, self.decode_batch, self._backend)

    def to(self, device: torch.device | str) -> Pipeline:
        """Moves the models; the caches are built anew at the next call."""
        self.generator.to(device)
        self.tokenizer.to(device)
        if self.text_encoder is not None:
            self.text_encoder.model.to(device)
        self._decoder = self._choose_decoder()
        self.invalidate()
        return self

    def invalidate(self) -> None:
        """Forgets what was read or computed from the models: to be called when their weights have changed."""
        self._engine = self._empty_caption = None
        if self._decoder is not None:
            self._decoder.refresh()

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the tqdm progress bar, for example ``disable=True``."""
        self._progress_bar_config = options

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        captions: TextCondition | None = None,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        cfg_interval: float = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        sample_logits: bool = True,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> PipelineOutput:
        """Draws one image per label or prompt (times ``num_images_per_prompt``, neighbours in the output).

        Exactly one of ``class_labels``, ``prompt`` and ``captions`` is given.

        Args:
            class_labels: ints in [0, num_classes]; num_classes is the unconditional class.
            prompt: text, needs the text encoder.
            captions: precomputed encoder states, as a :class:`TextCondition`.
            guidance_scale: classifier-free guidance; 1 turns it off.
            seeds: one per image: an image depends on its condition, its seed and the settings, on nothing else.
            generator: draw in the official order from this torch generator instead; images then depend on their batch.
                With neither, seeds are drawn from torch's global generator.
            cfg_interval, temperature, top_k, top_p, sample_logits: see :class:`SamplingParams`.
            output_type: see :data:`OutputType`.
            callback_on_step_end: called after every step; an exception ends the call and leaves the pipeline usable.

        Raises:
            InvalidRequestError: an argument out of range.
            OutOfMemoryError: ``max_images`` does not fit; nothing was allocated.
        """
        inputs.check_call(output_type, num_images_per_prompt, class_labels, prompt, captions)
        params = SamplingParams(
            cfg_scale=float(guidance_scale),
            cfg_interval=cfg_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            sample_logits=sample_logits,
        )
        if prompt is not None:
            captions = self._encode(prompt, params.uses_guidance, 1 if generator is None else self.max_images)
        given = inputs.label_list(class_labels) if captions is None else captions
        condition = inputs.repeat(given, num_images_per_prompt)
        decoding = Decoding(self.tokenizer, self._decoder, self.decode_batch, output_type)
        tokens = self._sample(condition, params, seeds, generator, callback_on_step_end, decoding)
        return PipelineOutput(decoding.images(tokens), tokens)

    def _encode(self, prompt: str | Sequence[str], guided: bool, batch: int) -> TextCondition:
        """Of ``batch`` prompts at a time: the encoder may round each as its company is, so 1 where that must not be."""
        if self.text_encoder is None:
            own = f"{self._trained_with!r} (the checkpoint's own)" if self._trained_with else ""
            raise InvalidRequestError(f"this pipeline has no text encoder: give text_encoder={own}, or pass captions=")
        features = self.text_encoder.encode(prompt, batch_size=batch)
        needs_empty = guided and not self.generator.config.learned_uncond
        if needs_empty and self._empty_caption is None:
            self._empty_caption = self.text_encoder.encode("")
        return inputs.encoded(features, self._empty_caption if needs_empty else None, self.device)

    def _sample(
        self,
        condition: list[int] | TextCondition,
        params: SamplingParams,
        seeds: int | Sequence[int] | None,
        generator: torch.Generator | None,
        callback: StepCallback | None,
        decoding: Decoding,
    ) -> torch.Tensor:
        count = len(condition)
        if seeds is not None and generator is not None:
            raise InvalidRequestError("give seeds or a generator, not both")
        keys = None if generator is not None else inputs.seed_list(seeds, count)
        if self._engine is None:
            self._engine = inputs.build_engine(
                self.generator, self.tokenizer, self.max_images, self.decode_batch, self.memory_budget, **self._options
            )
        engine = self._engine
        # Streams of their own need no lockstep: the engine queues what does not fit.
        size = count if keys is not None and not decoding.overlaps else self.max_images
        parts = []
        with tqdm(**{"unit": "step", "desc": "sampling", **self._progress_bar_config}) as bar:
            for start in range(0, count, size):
                first = bar.n

                def on_progress(made: int, total: int, first: int = first) -> None:
                    bar.total = max(bar.total or 0, first + total)
                    bar.update(first + made - bar.n)

                parts.append(
                    engine.generate(
                        inputs.take(condition, start, start + size),
                        params,
                        rng="torch" if keys is None else "philox",
                        seeds=None if keys is None else keys[start : start + size],
                        generator=generator,
                        callback=inputs.engine_callback(self, callback, first),
                        progress=on_progress,
                    )
                )
                decoding.add(parts[-1])
        return torch.cat(parts)
