"""What an image is conditioned on, and the prefix rows that follow from it."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gear_engine.config import GeneratorConfig
from gear_engine.errors import InvalidRequestError

__all__ = ["Condition", "PrefixRows", "TextCondition", "check_labels", "class_rows", "text_rows"]


@dataclass(frozen=True)
class TextCondition:
    """Captions as a text encoder's states.

    Attributes:
        states: (B, T, caption_dim), any float dtype; T is the model's ``cls_token_num``.
        mask: (B, T) bool (or 0 / 1), True where ``states`` holds a token, padding on any side; None means all.
        uncond_states: the encoder's states of the empty caption, (T, caption_dim) for all images or
            (B, T, caption_dim). None for models with a learned null caption, or if no image uses guidance.
        uncond_mask: (T,) or (B, T), as ``mask``. A learned null caption takes the caption's mask instead.

    Raises:
        InvalidRequestError: a shape does not fit the others, or a number is not finite.
    """

    states: torch.Tensor
    mask: torch.Tensor | None = None
    uncond_states: torch.Tensor | None = None
    uncond_mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.states.dim() != 3 or not self.states.is_floating_point():
            raise InvalidRequestError(f"states must be floats (B, T, caption_dim), not {tuple(self.states.shape)}")
        batch, length, width = self.states.shape
        if batch < 1:
            raise InvalidRequestError("a TextCondition needs at least one caption")
        self._check_mask("mask", self.mask, [(batch, length)])
        self._check_mask("uncond_mask", self.uncond_mask, [(length,), (batch, length)])
        if self.uncond_states is None:
            if self.uncond_mask is not None:
                raise InvalidRequestError("uncond_mask needs uncond_states")
        elif tuple(self.uncond_states.shape) not in ((length, width), (batch, length, width)):
            raise InvalidRequestError(
                f"uncond_states {tuple(self.uncond_states.shape)} must be {(length, width)} or {(batch, length, width)}"
            )
        for name, states in (("states", self.states), ("uncond_states", self.uncond_states)):
            if states is not None and not bool(torch.isfinite(states).all()):
                raise InvalidRequestError(f"{name} holds numbers that are not finite")

    @staticmethod
    def _check_mask(name: str, mask: torch.Tensor | None, shapes: list[tuple[int, ...]]) -> None:
        if mask is not None and tuple(mask.shape) not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise InvalidRequestError(f"{name} {tuple(mask.shape)} must be {wanted}")

    def __len__(self) -> int:
        return self.states.shape[0]

    def check(self, config: GeneratorConfig) -> None:
        """Raises :class:`InvalidRequestError` unless the captions fit the model."""
        if config.conditioning != "text":
            raise InvalidRequestError("this model is conditioned on class labels, not on captions")
        wanted = (config.cls_token_num, config.caption_dim)
        if tuple(self.states.shape[1:]) != wanted:
            raise InvalidRequestError(
                f"captions of shape {tuple(self.states.shape[1:])} do not fit a model with (cls_token_num, caption_dim)"
                f" = {wanted}"
            )
        if config.learned_uncond and self.uncond_states is not None:
            raise InvalidRequestError("this model has a learned null caption: leave uncond_states out")

    def caption(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States (T, caption_dim) and mask (T,) of one caption."""
        return self.states[index], None if self.mask is None else self.mask[index]

    def uncond(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """States and mask of one image's unconditional half, or None if there are none."""
        if self.uncond_states is None:
            return None
        states = self.uncond_states if self.uncond_states.dim() == 2 else self.uncond_states[index]
        mask = self.uncond_mask
        return states, mask if mask is None or mask.dim() == 1 else mask[index]


#: int64 labels (B,) or captions.
Condition = torch.Tensor | TextCondition


def _is_integer(value: Any) -> bool:
    """Python's ints and numpy's, no bools."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_labels(labels: torch.Tensor | Sequence[int], config: GeneratorConfig) -> list[int]:
    """Labels as a list of ints.

    Raises:
        InvalidRequestError: a label is not an integer in ``[0, num_classes]`` (``[0, num_classes)`` if the table has no
            unconditional row), or the model takes captions.
    """
    if config.conditioning != "class":
        raise InvalidRequestError("this model is conditioned on captions: pass a TextCondition, not labels")
    if isinstance(labels, torch.Tensor):
        if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise InvalidRequestError(f"labels must be integers of shape (B,), not {labels.dtype} {list(labels.shape)}")
        values = labels.tolist()
    else:
        values = [int(label) if _is_integer(label) else label for label in labels]
    if not values:
        raise InvalidRequestError("at least one label is needed")
    last = config.num_classes if config.has_uncond_class else config.num_classes - 1
    for value in values:
        if not _is_integer(value):
            raise InvalidRequestError(f"labels must be integers, got {value!r}")
        if not 0 <= value <= last:
            raise InvalidRequestError(f"label {value} must lie in [0, {last}]")
    return values


@dataclass(frozen=True)
class PrefixRows:
    """The prefix rows that have to be computed for P prefixes, packed one after the other.

    A prefix's rows are its valid ones in order and, if the last position is padding, that position too: its logits give
    the first image token. Rows that are padding are seen by nobody.

    Attributes:
        inputs: what the rows are embedded from: int64 (N,) labels, or (N, caption_dim) states.
        prefix_of: int64 (N,): the prefix a row belongs to.
        index_in: int64 (N,): the row's place among its prefix's packed rows.
        last: int64 (P,): the packed row at each prefix's last position.
        valid: int64 (P,): number of valid rows.
        width: the largest number of packed rows of a prefix.
    """

    inputs: torch.Tensor
    prefix_of: torch.Tensor
    index_in: torch.Tensor
    last: torch.Tensor
    valid: torch.Tensor
    width: int


def class_rows(labels: torch.Tensor) -> PrefixRows:
    """One valid row per label (P,)."""
    rows = torch.arange(labels.shape[0], device=labels.device)
    zeros, ones = torch.zeros_like(rows), torch.ones_like(rows)
    return PrefixRows(inputs=labels, prefix_of=rows, index_in=zeros, last=rows, valid=ones, width=1)


def text_rows(states: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> PrefixRows:
    """Packs P captions: states (T, caption_dim) each, masks (T,) or None."""
    inputs: list[torch.Tensor] = []
    prefix_of: list[int] = []
    index_in: list[int] = []
    last: list[int] = []
    valid: list[int] = []
    total = 0
    for prefix, (caption, mask) in enumerate(zip(states, masks, strict=True)):
        length = caption.shape[0]
        kept = list(range(length)) if mask is None else [i for i, bit in enumerate(mask.bool().tolist()) if bit]
        valid.append(len(kept))
        if not kept or kept[-1] != length - 1:
            kept.append(length - 1)
        inputs.append(caption if len(kept) == length else caption[torch.tensor(kept, device=caption.device)])
        prefix_of += [prefix] * len(kept)
        index_in += range(len(kept))
        total += len(kept)
        last.append(total - 1)
    device = inputs[0].device

    def index(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return PrefixRows(
        inputs=torch.cat(inputs),
        prefix_of=index(prefix_of),
        index_in=index(index_in),
        last=index(last),
        valid=index(valid),
        width=max(index_in) + 1,
    )
