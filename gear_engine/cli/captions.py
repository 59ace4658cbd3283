"""Captions as a run's source: prompts through a text encoder, or features from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gear_engine.errors import InvalidRequestError
from gear_engine.files import content_hash
from gear_engine.runs.batches import chunks, strided
from gear_engine.runs.labels import text_hash
from gear_engine.runs.record import Settings
from gear_engine.runs.world import World

if TYPE_CHECKING:
    import torch

    from gear_engine.config import GeneratorConfig
    from gear_engine.models.condition import TextCondition
    from gear_engine.text_encoders import QwenTextEncoder, T5TextEncoder

__all__ = ["EncodedPrompts", "FeatureFile", "TextFeatures", "TextSource", "read_prompts"]


def read_prompts(path: Path, limit: int = 0) -> list[str]:
    """The ``caption`` of every line of a JSONL file; blank lines do not count, 0 takes all.

    Raises:
        InvalidRequestError: the file cannot be read, a line is no object with a string ``caption``, or none is left.
    """
    prompts = []
    try:
        # Not splitlines(): a caption may hold U+2028 and its like, which end no line of JSON.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"cannot read prompts from {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            caption = json.loads(line)["caption"]
        except (ValueError, KeyError, TypeError):
            caption = None
        if not isinstance(caption, str):
            raise InvalidRequestError(f'{path} line {number} must be a JSON object such as {{"caption": "a red fox"}}')
        prompts.append(caption)
        if len(prompts) == limit:
            break
    if not prompts:
        raise InvalidRequestError(f"{path} holds no prompts")
    return prompts


class TextFeatures(Protocol):
    """States and masks of captions by number, and those of the empty caption."""

    @property
    def count(self) -> int:
        """Number of captions."""

    def settings(self) -> Settings:
        """What decides the states, for ``run.json``."""

    def states(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, caption_dim) floats and (B, T) bool, or None for all valid."""

    def empty(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """(T, caption_dim) and (T,) of the empty caption, or None if they are not known."""


class EncodedPrompts:
    """:class:`TextFeatures` of prompts, encoded when they are needed.

    Args:
        batch: prompts through the encoder at a time. With 1 a caption's states do not depend on its neighbours.
    """

    def __init__(self, prompts: list[str], encoder: QwenTextEncoder | T5TextEncoder, name: str, batch: int) -> None:
        self.count = len(prompts)
        self._name = name
        self._prompts = prompts
        self._encoder = encoder
        self._batch = batch

    def settings(self) -> Settings:
        return {
            "captions": {
                "sha256": text_hash(self._prompts),
                "text_encoder": self._name,
                "text_max_len": self._encoder.max_length,
                "text_dtype": str(self._encoder.dtype).removeprefix("torch."),
                "encode_batch": self._batch,
            }
        }

    def states(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = self._encoder.encode([self._prompts[index] for index in indices], batch_size=self._batch)
        return features.states, features.mask

    def empty(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        from gear_engine.text_encoders import QwenTextEncoder

        if not isinstance(self._encoder, QwenTextEncoder):
            return None
        features = self._encoder.encode_empty()
        return features.states[0], features.mask[0]


class FeatureFile:
    """:class:`TextFeatures` in a safetensors file, read caption by caption.

    Tensors: ``states`` (N, T, caption_dim); optional ``mask`` (N, T), non-zero where there is a token;
    ``uncond_states`` (T, caption_dim) and optional ``uncond_mask`` (T,) of the empty caption, for guidance.

    Raises:
        InvalidRequestError: the file cannot be read or a shape does not fit.
    """

    def __init__(self, path: Path, limit: int = 0) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file: Any = safe_open(str(path), framework="pt")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InvalidRequestError(f"cannot read features from {path}: {error}") from error
        known = ("states", "mask", "uncond_states", "uncond_mask")
        states = shapes.get("states", ())
        if len(states) != 3 or min(states) < 1 or not set(shapes) <= set(known):
            raise InvalidRequestError(
                f"{path} must hold 'states' (N, T, caption_dim) and may hold {', '.join(known[1:])}; it holds {shapes}"
            )
        expected = {"mask": states[:2], "uncond_states": states[1:], "uncond_mask": states[1:2]}
        for name, shape in expected.items():
            if shapes.get(name, shape) != shape:
                raise InvalidRequestError(f"{path}: {name!r} is {shapes[name]}, 'states' asks for {shape}")
        self._file = file
        self._names = set(shapes)
        self.count = min(limit, states[0]) if limit else states[0]
        self._path = path

    def settings(self) -> Settings:
        return {"captions": {"features_sha256": content_hash(self._path)}}

    def states(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._rows("states", indices), self._rows("mask", indices) != 0 if "mask" in self._names else None

    def empty(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        if "uncond_states" not in self._names:
            return None
        mask = self._file.get_tensor("uncond_mask") != 0 if "uncond_mask" in self._names else None
        return self._file.get_tensor("uncond_states"), mask

    def _rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        import torch

        rows = self._file.get_slice(name)
        return torch.cat([rows[index : index + 1] for index in indices])


class TextSource:
    """Captions for a text model; see :class:`gear_engine.cli.sampling.Source`.

    Raises:
        InvalidRequestError: the states do not fit the model, or guidance is asked for and those of the empty caption
            are not known.
    """

    def __init__(self, features: TextFeatures, config: GeneratorConfig, device: torch.device, guided: bool) -> None:
        self.count = features.count
        self._features = features
        self._device = device
        self._uncond: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if guided and not config.learned_uncond:
            self._uncond = features.empty()
            if self._uncond is None:
                raise InvalidRequestError(
                    "--cfg-scale above 1 needs the encoder's states of the empty caption: add 'uncond_states' to the "
                    "features, or use a Qwen text encoder"
                )
        self.condition([0]).check(config)

    def settings(self) -> Settings:
        return self._features.settings()

    def ordered_batches(self, world: World, batch: int) -> list[list[int]]:
        return chunks(strided(self.count, world.size, world.rank), batch)

    def torch_seed(self, seed: int, world: World) -> int:
        return seed * world.size + world.rank

    def condition(self, indices: Sequence[int]) -> TextCondition:
        from gear_engine.models.condition import TextCondition

        states, mask = self._features.states(indices)
        uncond, uncond_mask = self._uncond or (None, None)
        return TextCondition(
            states.to(self._device),
            None if mask is None else mask.to(self._device),
            None if uncond is None else uncond.to(self._device),
            None if uncond_mask is None else uncond_mask.to(self._device),
        )
