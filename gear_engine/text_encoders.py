"""Prompts to encoder states: Qwen3 (GEAR's text models) and T5 (LlamaGen's), through transformers.

Installed by the ``t2i`` extra. Everything else in gear_engine takes precomputed states, so a machine that samples
needs no text encoder. Source of the conventions: GEAR ``src/inference_t2i.py`` and LlamaGen
``autoregressive/sample/sample_t2i.py`` with ``language/t5.py``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gear_engine.caption_cleaning import clean_caption
from gear_engine.errors import BackendUnavailableError, CheckpointError, InvalidRequestError

__all__ = [
    "CaptionFeatures",
    "QwenTextEncoder",
    "T5TextEncoder",
    "TextEncoder",
    "left_pad",
    "load_text_encoder",
]

_MISSING = "prompts need the transformers package: pip install 'gear-engine[t2i]', or pass precomputed caption states"

_PINNED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


@dataclass(frozen=True)
class CaptionFeatures:
    """Encoder states of B captions.

    Attributes:
        states: (B, T, caption_dim), the encoder's dtype.
        mask: (B, T) booleans, True where ``states`` holds a token of the caption.
    """

    states: torch.Tensor
    mask: torch.Tensor


def left_pad(states: torch.Tensor, mask: torch.Tensor) -> CaptionFeatures:
    """Move each caption's valid states to the right end and zero the rest, as LlamaGen's text models expect.

    Args:
        states: (B, T, C), valid tokens first.
        mask: (B, T), 1 or True for the valid tokens; they must be a prefix of each row.

    Returns:
        States rolled so that the valid ones come last, multiplied by the flipped mask, and that mask.

    Raises:
        InvalidRequestError: a row's valid tokens are not a prefix.
    """
    valid = mask.bool()
    lengths = valid.sum(dim=1)  # [B]
    columns = torch.arange(states.shape[1], device=states.device)
    if not torch.equal(valid, columns[None] < lengths[:, None]):
        raise InvalidRequestError("left_pad expects the valid tokens first in each row (right padding)")
    source = (columns[None] + lengths[:, None]) % states.shape[1]  # [B, T]
    rolled = states.gather(1, source[:, :, None].expand_as(states))
    flipped = valid.flip(-1)
    return CaptionFeatures(rolled * flipped[:, :, None].to(states.dtype), flipped)


class TextEncoder:
    """A frozen text tower with its tokenizer.

    Args:
        tokenizer: a transformers tokenizer; its own padding side is kept.
        model: called as ``model(input_ids=, attention_mask=)``, returns ``last_hidden_state`` (B, T, C).
        max_length: T, every caption is padded or cut to it.
        preprocess: applied to each prompt before the tokenizer; None leaves it as it is.
    """

    kind: Literal["qwen", "t5"]

    def __init__(
        self, tokenizer: Any, model: torch.nn.Module, max_length: int, preprocess: Callable[[str], str] | None = None
    ) -> None:
        if max_length < 1:
            raise InvalidRequestError(f"max_length must be at least 1, got {max_length}")
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.max_length = max_length
        self.preprocess = preprocess

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def hidden_size(self) -> int:
        """Width of the states: the generator's ``caption_dim``."""
        config: Any = self.model.config
        return int(getattr(config, "d_model", None) or config.hidden_size)

    def encode(self, prompts: str | Sequence[str], *, batch_size: int = 32) -> CaptionFeatures:
        """States and masks of ``prompts``; ``batch_size`` prompts go through the tower at a time.

        The tower is a model of transformers, whose rounding may follow how many prompts it is given: with a
        ``batch_size`` of 1, a caption's states do not depend on the prompts beside it.

        Every caption is padded to ``max_length`` and the padded rows are encoded too: the state of the last row gives
        the first image token's logits even when it is padding.

        Raises:
            InvalidRequestError: no prompt, or something that is not a string.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidRequestError("prompts must be a string or a non-empty sequence of strings")
        if batch_size < 1:
            raise InvalidRequestError(f"batch_size must be at least 1, got {batch_size}")
        parts = [self._encode_batch(list(texts[i : i + batch_size])) for i in range(0, len(texts), batch_size)]
        return CaptionFeatures(torch.cat([p.states for p in parts]), torch.cat([p.mask for p in parts]))

    @torch.no_grad()
    def _encode_batch(self, texts: list[str]) -> CaptionFeatures:
        if self.preprocess is not None:
            texts = [self.preprocess(text) for text in texts]
        batch = self.tokenizer(
            texts, max_length=self.max_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        ids = batch["input_ids"].to(self.device)
        mask = batch["attention_mask"].to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, T, C]
        return self._arrange(states, mask)

    def _arrange(self, states: torch.Tensor, mask: torch.Tensor) -> CaptionFeatures:
        return CaptionFeatures(states, mask.bool())


class QwenTextEncoder(TextEncoder):
    """GEAR's captions: last hidden states of a causal language model (Qwen3-1.7B), 300 tokens by default.

    The unconditional half of guidance is the encoder's answer to the empty string: :meth:`encode_empty`.
    """

    kind = "qwen"

    def encode_empty(self) -> CaptionFeatures:
        """States (1, T, C) and mask (1, T) of the empty caption; its mask may hold no valid token at all."""
        return self._encode_batch([""])


class T5TextEncoder(TextEncoder):
    """LlamaGen's captions: T5 encoder states (flan-t5-xl), 120 tokens by default, moved to the right end.

    Args:
        pad_left: False keeps right padding (still multiplied by the mask), the official ``--no-left-padding``.
    """

    kind = "t5"

    def __init__(
        self,
        tokenizer: Any,
        model: torch.nn.Module,
        max_length: int,
        preprocess: Callable[[str], str] | None = None,
        *,
        pad_left: bool = True,
    ) -> None:
        super().__init__(tokenizer, model, max_length, preprocess)
        self.pad_left = pad_left

    def _arrange(self, states: torch.Tensor, mask: torch.Tensor) -> CaptionFeatures:
        if self.pad_left:
            return left_pad(states, mask)
        return CaptionFeatures(states * mask[:, :, None].to(states.dtype), mask.bool())


def load_text_encoder(
    path: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    preprocess: Callable[[str], str] | None = None,
) -> QwenTextEncoder | T5TextEncoder:
    """Open a text encoder from a local folder or a hub name; its ``config.json`` tells which kind it is.

    Only the text tower is kept: a T5's decoder is never read, a vision tower is dropped. Code from the repository is
    never run. ``HF_HUB_OFFLINE=1`` or ``local_files_only=True`` keep to the local cache; a folder never touches the
    network.

    Args:
        path: folder, ``owner/name``, or ``owner/name@revision`` to pin a commit, tag or branch.
        max_length: tokens per caption, the generator's ``cls_token_num``; default 300 (Qwen), 120 (T5).
        dtype: default bfloat16, the official programs' choice.
        preprocess: applied to each prompt first. None: nothing for Qwen, for T5 the cleaning that LlamaGen's models
            were trained with (:func:`gear_engine.caption_cleaning.clean_caption`); ``str`` turns that off.
        revision: the same as ``@revision`` in the name.

    Raises:
        BackendUnavailableError: transformers is not installed.
        CheckpointError: nothing usable is at ``path``.
        InvalidRequestError: ``path`` and ``revision`` name different revisions.
    """
    name, revision = _split_revision(os.fspath(path), revision)
    try:
        import transformers
    except ImportError as error:
        raise BackendUnavailableError(_MISSING) from error
    options: dict[str, Any] = {"local_files_only": local_files_only or Path(name).is_dir()}
    if revision is not None:
        options["revision"] = revision
    weight_dtype = torch.bfloat16 if dtype is None else dtype
    with _as_checkpoint_error(name):
        is_t5 = transformers.AutoConfig.from_pretrained(name, **options).model_type in ("t5", "mt5", "umt5")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        loader: Any = transformers.T5EncoderModel if is_t5 else transformers.AutoModel
        model = loader.from_pretrained(name, dtype=weight_dtype, **options)
    model = getattr(model, "language_model", model)
    model = model.to(device or "cpu")
    if is_t5:
        return T5TextEncoder(tokenizer, model, max_length or 120, preprocess or clean_caption)
    return QwenTextEncoder(tokenizer, model, max_length or 300, preprocess)


def _split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """Repository and revision of ``owner/name@revision``; anything that exists here is a folder."""
    match = None if os.path.exists(name) else _PINNED.fullmatch(name)
    if match is None:
        return name, revision
    if revision not in (None, match["revision"]):
        raise InvalidRequestError(f"{name} and revision={revision!r} name different revisions: give one of them")
    return match["repo"], match["revision"]


@contextlib.contextmanager
def _as_checkpoint_error(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"no text encoder at {name!r}: {reason}. Give a folder with config.json, weights and a tokenizer, or a hub "
            "name that is in the local cache when offline"
        ) from error
