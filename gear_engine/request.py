"""What a user asks for: sampling settings and one image's request."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gear_engine.errors import InvalidRequestError

__all__ = ["ImageRequest", "RngMode", "SamplingParams", "check_length", "check_source"]

#: ``"torch"``: the official draw order from a torch generator. ``"philox"``: a counter-based stream per image.
RngMode = Literal["torch", "philox"]


def _number(name: str, value: Any) -> float:
    # The abstract types: numpy's scalars are numbers too.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidRequestError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be finite, got {value}")
    return float(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidRequestError(f"{name} must be an int, got {value!r}")
    return int(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn from logits; the names and defaults of the official sampler.

    Per step, on one image's logits l (fp32, vocabulary V):

    1. guidance, only if ``cfg_scale > 1``: ``l = l_uncond + (l_cond - l_uncond) * cfg_scale``.
       With ``cfg_interval = n > -1``, decode step i (0 = the step after the first sampled token) uses l_cond alone
       when i > n.
    2. ``l / max(temperature, 1e-5)``.
    3. top-k: keep the ``min(top_k, V)`` largest and all ties with the last of them; 0 keeps all.
    4. top-p: of what is left, in descending order, drop tokens after the cumulative probability first exceeds
       ``top_p``; the first one over it stays; 1 keeps all.
    5. draw from softmax(l), or take its argmax when ``sample_logits`` is false.

    Raises:
        InvalidRequestError: a value is out of range or not finite.
    """

    cfg_scale: float = 1.0
    cfg_interval: float = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    sample_logits: bool = True

    def __post_init__(self) -> None:
        if _number("cfg_scale", self.cfg_scale) < 0:
            raise InvalidRequestError(f"cfg_scale must not be negative, got {self.cfg_scale}")
        _number("cfg_interval", self.cfg_interval)
        if _number("temperature", self.temperature) < 0:
            raise InvalidRequestError(f"temperature must not be negative, got {self.temperature}")
        if _integer("top_k", self.top_k) < 0:
            raise InvalidRequestError(f"top_k must not be negative (0 keeps every token), got {self.top_k}")
        if not 0 < _number("top_p", self.top_p) <= 1:
            raise InvalidRequestError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not isinstance(self.sample_logits, bool):
            raise InvalidRequestError(f"sample_logits must be a bool, got {self.sample_logits!r}")
        for name in ("cfg_scale", "cfg_interval", "temperature", "top_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "top_k", int(self.top_k))

    @property
    def uses_guidance(self) -> bool:
        return self.cfg_scale > 1.0

    @property
    def guided_tokens(self) -> float:
        """How many leading image tokens are drawn with guidance: 0, a whole number, or infinity.

        The first token comes from the prefill and always uses guidance if there is any; token t >= 1 comes from decode
        step t - 1.
        """
        if not self.uses_guidance:
            return 0
        return math.floor(self.cfg_interval) + 2 if self.cfg_interval > -1 else math.inf

    def guided_at(self, position: int) -> bool:
        """Whether the draw of image token ``position`` (0-based) mixes in the unconditional logits."""
        return position < self.guided_tokens


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image to draw.

    Attributes:
        label: class label in ``[0, num_classes]`` (``num_classes`` is the unconditional class), or None for text.
        caption: encoder states (T, caption_dim) of the caption, or None for labels.
        caption_mask: (T,) booleans, True where ``caption`` holds a token; None means all.
        null_caption: encoder states (T, caption_dim) of the empty caption: guidance needs it, unless the model has a
            learned one.
        null_caption_mask: (T,), as ``caption_mask``.
        seed: key of the image's own Philox stream, in ``[0, 2**63)``.
        params: sampling settings.
        max_new_tokens: image tokens to draw; None means the model's ``block_size``.
    """

    label: int | None = None
    caption: Any = None
    caption_mask: Any = None
    null_caption: Any = None
    null_caption_mask: Any = None
    seed: int = 0
    params: SamplingParams = SamplingParams()
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.label is None) == (self.caption is None):
            raise InvalidRequestError("a request holds either a label or a caption")
        if self.label is not None:
            object.__setattr__(self, "label", _integer("label", self.label))
        object.__setattr__(self, "seed", _integer("seed", self.seed))
        if not 0 <= self.seed < 2**63:
            raise InvalidRequestError(f"seed must lie in [0, 2**63), got {self.seed}")
        if self.max_new_tokens is not None and _integer("max_new_tokens", self.max_new_tokens) < 1:
            raise InvalidRequestError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


def check_length(max_new_tokens: int | None, limit: int) -> int:
    """Image tokens to draw, ``limit`` by default.

    Raises:
        InvalidRequestError: not an integer in ``[1, limit]``.
    """
    if max_new_tokens is None:
        return limit
    if not 1 <= _integer("max_new_tokens", max_new_tokens) <= limit:
        raise InvalidRequestError(f"max_new_tokens {max_new_tokens} must lie in [1, {limit}]")
    return int(max_new_tokens)


def check_source(
    rng: RngMode, count: int, max_images: int, seeds: Sequence[int] | None, generator_on: str | None, device: str
) -> list[int]:
    """One Philox key per image, 0 ... count - 1 by default (all 0, and unused, under ``rng="torch"``).

    ``generator_on``, ``device``: the kinds of device that a torch generator, if there is one, and the engine are on.

    Raises:
        InvalidRequestError: not ``count`` seeds in ``[0, 2**63)``; a source of randomness that does not go with
            ``rng``; or more images than ``rng="torch"`` can draw in step.
    """
    if rng == "torch":
        if seeds is not None:
            raise InvalidRequestError("seeds go with rng='philox'; seed the torch generator for rng='torch'")
        if count > max_images:
            raise InvalidRequestError(
                f"rng='torch' draws for all images in step: {count} images need max_images >= {count}, not {max_images}"
            )
        if generator_on not in (None, device):
            raise InvalidRequestError(f"the generator draws on {generator_on}, the engine on {device}")
        return [0] * count
    if rng != "philox":
        raise InvalidRequestError(f"rng must be 'torch' or 'philox', got {rng!r}")
    if generator_on is not None:
        raise InvalidRequestError("a torch generator goes with rng='torch'; rng='philox' takes seeds")
    found = list(range(count)) if seeds is None else [_integer("seed", seed) for seed in seeds]
    if len(found) != count:
        raise InvalidRequestError(f"{len(found)} seeds for {count} images")
    for seed in found:
        if not 0 <= seed < 2**63:
            raise InvalidRequestError(f"seed must lie in [0, 2**63), got {seed}")
    return found
