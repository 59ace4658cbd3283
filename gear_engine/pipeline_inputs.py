"""What a :class:`~gear_engine.pipeline.Pipeline` checks and arranges before it samples."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from gear_engine.checkpoint import GeneratorOverrides, TokenizerOverrides, checkpoint_args
from gear_engine.config import GeneratorConfig
from gear_engine.engine import Engine
from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.hub import local_path
from gear_engine.memory import available_bytes, check_fits, decoder_bytes
from gear_engine.models.condition import TextCondition
from gear_engine.models.transformer import Transformer
from gear_engine.steps import StepCallback
from gear_engine.text_encoders import CaptionFeatures, TextEncoder
from gear_engine.tokenizers import Tokenizer

__all__ = [
    "build_engine",
    "check_call",
    "check_fit",
    "encoded",
    "engine_callback",
    "label_list",
    "repeat",
    "seed_list",
    "split_overrides",
    "take",
    "trained_text_encoder",
]


def check_fit(generator: Transformer, tokenizer: Tokenizer, text_encoder: TextEncoder | None) -> None:
    """Raises :class:`ConfigError` unless codes, captions and conditioning of the models belong together."""
    config, codes = generator.config, tokenizer.config
    if codes.num_codebooks != 1 or codes.codebook_size != config.vocab_size:
        raise ConfigError(
            f"the generator draws {config.vocab_size} codes, one per position; the tokenizer has "
            f"{codes.codebook_size} in {codes.num_codebooks} group(s)"
        )
    if text_encoder is None:
        return
    if config.conditioning != "text":
        raise ConfigError("a class-conditional generator takes no text encoder")
    if (text_encoder.max_length, text_encoder.hidden_size) != (config.cls_token_num, config.caption_dim):
        raise ConfigError(
            f"the text encoder gives {text_encoder.max_length} x {text_encoder.hidden_size} states per caption, the "
            f"generator takes {config.cls_token_num} x {config.caption_dim}"
        )
    if config.learned_uncond != (text_encoder.kind == "t5"):
        raise ConfigError("LlamaGen's text models take T5 states, GEAR's a causal language model's")


def build_engine(
    generator: Transformer,
    tokenizer: Tokenizer,
    max_images: int,
    decode_batch: int,
    memory_budget: int | None,
    **options: Any,
) -> Engine:
    """The engine, in what decoding ``decode_batch`` images while its caches are held leaves of ``memory_budget`` bytes;
    None: of what the device has left.

    Raises:
        OutOfMemoryError: decoder or engine do not fit; nothing was allocated.
    """
    config, size = tokenizer.config, generator.config.grid_size * tokenizer.config.downsample
    images = min(decode_batch, max_images)
    decoder = decoder_bytes(config, size, size, images, tokenizer.dtype)
    available = available_bytes(next(generator.parameters()).device) if memory_budget is None else memory_budget
    check_fits({f"decoder, {images} images at once": decoder}, available, "lower decode_batch")
    budget = None if available is None else available - decoder
    return Engine(generator, max_images=max_images, memory_budget=budget, **options)


def trained_text_encoder(path: str | os.PathLike[str], config: GeneratorConfig) -> tuple[str | None, str]:
    """Name of the text encoder of a checkpoint's training, None if it does not say, and ``bf16``, ``fp16`` or ``fp32``.

    As officially, GEAR's encoder ran in the trainer's ``mixed_precision`` (bf16 if that is not known, fp32 if it is
    neither bf16 nor fp16); LlamaGen's runs in bf16.
    """
    saved = checkpoint_args(local_path(path))
    name = saved.get("text_encoder")
    trained = "bf16" if config.learned_uncond else saved.get("mixed_precision", "bf16")
    return name if isinstance(name, str) and name else None, trained if trained in ("bf16", "fp16") else "fp32"


def check_call(output_type: str, images_per_prompt: int, *sources: object) -> None:
    """Raises :class:`InvalidRequestError` for an output or a count that is none, or unless one source is given."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise InvalidRequestError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
    if images_per_prompt < 1:
        raise InvalidRequestError(f"num_images_per_prompt must be at least 1, got {images_per_prompt}")
    if sum(given is not None for given in sources) != 1:
        raise InvalidRequestError("give exactly one of class_labels, prompt and captions")


def encoded(features: CaptionFeatures, empty: CaptionFeatures | None, device: torch.device) -> TextCondition:
    """The condition of encoded captions; ``empty`` are the states of the empty caption where guidance needs them."""
    states, mask = features.states.to(device), features.mask.to(device)
    if empty is None:
        return TextCondition(states, mask)
    return TextCondition(states, mask, empty.states[0].to(device), empty.mask[0].to(device))


def _integers(name: str, values: Any) -> list[int]:
    """Integers of any form (one, a sequence, a numpy array, a tensor) as Python's own."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    listed = [values] if isinstance(values, numbers.Integral) else values
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable):
        raise InvalidRequestError(f"{name} must be integers, not {values!r}")
    found = list(listed)
    for value in found:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InvalidRequestError(f"{name} must be integers, not {value!r}")
    return [int(value) for value in found]


def label_list(labels: int | Sequence[int] | torch.Tensor | None) -> list[int]:
    """Labels of any form as ints; their range is checked by the engine."""
    found = _integers("class_labels", labels.reshape(-1) if isinstance(labels, torch.Tensor) else labels)
    if not found:
        raise InvalidRequestError("at least one label is needed")
    return found


def repeat(condition: list[int] | TextCondition, times: int) -> list[int] | TextCondition:
    """Every condition ``times`` times, neighbours in the result."""
    if times == 1:
        return condition
    if isinstance(condition, list):
        return [label for label in condition for _ in range(times)]

    def rows(tensor: torch.Tensor | None, batched_dim: int) -> torch.Tensor | None:
        if tensor is None or tensor.dim() < batched_dim:
            return tensor
        return tensor.repeat_interleave(times, dim=0)

    return TextCondition(
        condition.states.repeat_interleave(times, dim=0),
        rows(condition.mask, 2),
        rows(condition.uncond_states, 3),
        rows(condition.uncond_mask, 2),
    )


def take(condition: list[int] | TextCondition, start: int, end: int) -> list[int] | TextCondition:
    """The conditions ``start`` to ``end``."""
    if isinstance(condition, list):
        return condition[start:end]

    def rows(tensor: torch.Tensor | None, batched_dim: int) -> torch.Tensor | None:
        return tensor if tensor is None or tensor.dim() < batched_dim else tensor[start:end]

    return TextCondition(
        condition.states[start:end],
        rows(condition.mask, 2),
        rows(condition.uncond_states, 3),
        rows(condition.uncond_mask, 2),
    )


def seed_list(seeds: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per image; without any they come from torch's global generator."""
    if seeds is None:
        drawn: list[int] = torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64).tolist()
        return drawn
    given = _integers("seeds", seeds)
    if len(given) != count:
        raise InvalidRequestError(f"{count} images need {count} seeds, got {len(given)}")
    return given


def split_overrides(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of the generator and of the tokenizer; one that both know goes to both.

    Raises:
        ConfigError: nobody knows an override.
    """
    generator, tokenizer = ({f.name for f in fields(kind)} for kind in (GeneratorOverrides, TokenizerOverrides))
    for name in overrides:
        if name not in generator | tokenizer:
            raise ConfigError(f"unknown option {name!r}; a model's overrides are {sorted(generator | tokenizer)}")
    return (
        {name: value for name, value in overrides.items() if name in generator},
        {name: value for name, value in overrides.items() if name in tokenizer},
    )


def engine_callback(pipe: Any, callback: Callable[..., Any] | None, first: int) -> StepCallback | None:
    """A pipeline's ``callback`` as the engine calls it, for a part of a call that begins at step ``first``.

    None stays None: the engine makes many steps at a time unless somebody looks at the tokens.
    """
    if callback is None:
        return None
    return lambda step, total, tokens: callback(pipe, first + step, step, {"tokens": tokens})
