"""The prefixes of a batch that starts: labels or captions, and their unconditional halves."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gear_engine.config import GeneratorConfig
from gear_engine.errors import InvalidRequestError
from gear_engine.models.condition import Condition, TextCondition, check_labels, text_rows
from gear_engine.models.weights import GeneratorWeights
from gear_engine.ops import GeneratorOps
from gear_engine.request import ImageRequest, SamplingParams
from gear_engine.runner import PrefixState, encode_prefix
from gear_engine.scheduler import ScheduledBatch

__all__ = ["Caption", "PrefixEncoder", "caption_condition", "check_conditions", "prefix_labels"]

#: Prompt rows that go through the model at once: bounds the activations of a large batch of long captions.
MAX_ROWS = 2048
#: Unconditional prefixes that are kept (LlamaGen's text models have one per caption length).
MAX_KEPT = 160


@dataclass(frozen=True)
class Caption:
    """One image's caption: states (T, caption_dim), mask (T,) or None, and the null caption, None if it is learned."""

    states: torch.Tensor
    mask: torch.Tensor | None
    null: tuple[torch.Tensor, torch.Tensor | None] | None


def caption_condition(request: ImageRequest) -> TextCondition:
    """The caption of one request as a batch of one."""

    def batched(value: Any) -> torch.Tensor | None:
        return None if value is None else torch.as_tensor(value)[None]

    states = torch.as_tensor(request.caption)
    null = None if request.null_caption is None else torch.as_tensor(request.null_caption)
    null_mask = None if request.null_caption_mask is None else torch.as_tensor(request.null_caption_mask)
    return TextCondition(states[None], batched(request.caption_mask), null, null_mask)


def check_conditions(
    condition: Condition | Sequence[int],
    params: SamplingParams | Sequence[SamplingParams] | None,
    config: GeneratorConfig,
) -> tuple[list[int] | list[Caption], list[SamplingParams]]:
    """One label or caption, and one set of settings, per image.

    Raises:
        InvalidRequestError: the condition or the number of settings does not fit, or guidance lacks its other half.
    """
    found: list[int] | list[Caption]
    if isinstance(condition, TextCondition):
        condition.check(config)
        found = [Caption(*condition.caption(index), condition.uncond(index)) for index in range(len(condition))]
        has_other_half = config.learned_uncond or condition.uncond_states is not None
        remedy = "pass the text encoder's states of the empty caption"
    else:
        found = check_labels(condition, config)
        has_other_half = config.has_uncond_class
        remedy = "this model's label table has no unconditional class"
    every = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(found)
    if not all(isinstance(each, SamplingParams) for each in every):
        raise InvalidRequestError("sampling settings must be SamplingParams")
    if len(every) != len(found):
        raise InvalidRequestError(f"{len(every)} sampling settings for {len(found)} images")
    if any(each.uses_guidance for each in every) and not has_other_half:
        raise InvalidRequestError(f"guidance (cfg_scale > 1) needs an unconditional half: {remedy}")
    return found, every


def _key(states: torch.Tensor | None, mask: torch.Tensor | None) -> bytes:
    """Digest of a null caption: the same content in another tensor is the same prefix."""
    digest = hashlib.blake2b()
    if states is not None:
        digest.update(states.detach().float().cpu().contiguous().numpy().tobytes())
    if mask is not None:
        digest.update(mask.detach().bool().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    """Tells two living tensors of one shape apart unless they are the same view of the same bytes."""
    return tensor.data_ptr(), tensor.stride(), tensor.dtype


def prefix_labels(batch: ScheduledBatch, num_classes: int) -> list[int]:
    """Of a batch's rows: a label per image, then the unconditional class for the guided ones."""
    return [*(image.condition for image in batch.images), *[num_classes] * (len(batch.slots) - len(batch.images))]


class PrefixEncoder:
    """Captions -> prefix states, conditional ones first.

    A null caption goes through the model once: all images and all calls share its state, until the weights change
    (:meth:`forget`). GEAR's models have one; LlamaGen's have one per caption mask.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, PrefixState] = OrderedDict()

    def forget(self) -> None:
        """Drops the kept states: the weights have changed."""
        self._kept.clear()

    def captions(
        self, weights: GeneratorWeights, ops: GeneratorOps, captions: Sequence[Caption], guided: Sequence[bool]
    ) -> PrefixState:
        """A caption per image, then the null captions of the guided ones."""
        states = self._encode(weights, ops, [(caption.states, caption.mask) for caption in captions])
        wanted = []
        missing: dict[bytes, tuple[torch.Tensor, torch.Tensor | None]] = {}
        keys: dict[tuple[Any, Any], bytes] = {}
        for caption, is_guided in zip(captions, guided, strict=True):
            if not is_guided:
                continue
            null, mask = caption.null if caption.null is not None else (weights.uncond_embedding, caption.mask)
            if null is None:
                raise ValueError("an image with guidance has no null caption")
            # Images of one request batch share the tensors: their content is hashed once.
            pair = (_place(null), None if mask is None else _place(mask))
            if pair not in keys:
                keys[pair] = _key(None if caption.null is None else null, mask)
            key = keys[pair]
            wanted.append(key)
            if key not in self._kept:
                missing[key] = (null, mask)
        kept = dict(self._kept)
        for key, state in zip(missing, self._encode(weights, ops, list(missing.values())), strict=True):
            kept[key] = self._kept[key] = state
        for key in wanted:
            self._kept.move_to_end(key)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return PrefixState.join(states + [kept[key] for key in wanted])

    @staticmethod
    def _encode(
        weights: GeneratorWeights, ops: GeneratorOps, prompts: list[tuple[torch.Tensor, torch.Tensor | None]]
    ) -> list[PrefixState]:
        """One state per prompt, at most MAX_ROWS rows (but at least one prompt) at a time."""
        length = weights.config.cls_token_num
        at_once = max(1, MAX_ROWS // length)
        found = []
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            rows = text_rows([states.to(weights.device) for states, _ in part], [mask for _, mask in part])
            state = encode_prefix(weights, ops, rows)
            found += [state.select(index) for index in range(len(part))]
        return found
