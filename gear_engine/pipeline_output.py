"""What a :class:`~gear_engine.pipeline.Pipeline` returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from gear_engine.memory import out_of_memory_is_typed
from gear_engine.tokenizers import Decoder, DeviceDecoder, Tokenizer, to_uint8
from gear_engine.tokenizers.device_decoder import Pending

__all__ = ["Decoding", "Images", "OutputType", "PipelineOutput", "arrange", "decode", "join"]

#: ``"pil"``: a list of PIL images, the official pixels. ``"np"``: float32 (B, H, W, 3) in [0, 1]. ``"pt"``: floats
#: (B, 3, H, W) in [0, 1]. ``"latent"``: no decoding, the images are the tokens.
OutputType = Literal["pil", "np", "pt", "latent"]
Images = list[Image.Image] | np.ndarray[Any, Any] | torch.Tensor


@dataclass(frozen=True)
class PipelineOutput:
    """What a :class:`Pipeline` call returns.

    Attributes:
        images: see :data:`OutputType`.
        tokens: int32 (B, block_size), the image tokens on the generator's device.
    """

    images: Images
    tokens: torch.Tensor


def arrange(images: torch.Tensor, output_type: OutputType) -> torch.Tensor:
    """Decoded floats (B, 3, H, W): pixels on the CPU for ``"pil"``, floats in [0, 1] otherwise."""
    return to_uint8(images).cpu() if output_type == "pil" else (images / 2 + 0.5).clamp(0, 1)


def join(parts: Sequence[torch.Tensor], output_type: OutputType) -> Images:
    """The chunks of :func:`arrange` in the form that was asked for."""
    joined = torch.cat(list(parts))
    if output_type == "pil":
        return [Image.fromarray(pixels) for pixels in joined.numpy()]
    return joined if output_type == "pt" else joined.permute(0, 2, 3, 1).float().cpu().numpy()


def decode(
    tokens: torch.Tensor,
    tokenizer: Tokenizer,
    decode_code: Callable[..., torch.Tensor],
    batch: int,
    output_type: OutputType,
) -> Images:
    """Tokens (B, n) of square images to pixels, ``batch`` images at a time through ``decode_code``."""
    grid, config = math.isqrt(tokens.shape[1]), tokenizer.config
    parts = []
    for chunk in torch.split(tokens.to(tokenizer.device), batch):
        with out_of_memory_is_typed("lower decode_batch"):
            images = decode_code(chunk.long(), (len(chunk), config.codebook_embed_dim, grid, grid))
            parts.append(arrange(images, output_type))
    return join(parts, output_type)


class Decoding:
    """The images of one call. Its tokens may come in parts: a GPU's decoder begins with each at once.

    Attributes:
        overlaps: whether that is so; then it pays to draw in parts.
    """

    def __init__(
        self, tokenizer: Tokenizer, decoder: Decoder | DeviceDecoder | None, batch: int, output_type: OutputType
    ) -> None:
        self._tokenizer, self._decoder, self._batch, self._output_type = tokenizer, decoder, batch, output_type
        self._pending: list[Pending] = []
        self._device_decoder = decoder if isinstance(decoder, DeviceDecoder) and output_type == "pil" else None
        self.overlaps = self._device_decoder is not None

    def add(self, tokens: torch.Tensor) -> None:
        """The next tokens (B, n), in order."""
        if self._device_decoder is not None:
            with out_of_memory_is_typed("lower decode_batch"):
                self._pending.append(self._device_decoder.submit(tokens))

    def images(self, tokens: torch.Tensor) -> Images:
        """All images; ``tokens`` are all that were added."""
        if self._output_type == "latent":
            return tokens
        if self._device_decoder is not None:
            return join([pending.result() for pending in self._pending], self._output_type)
        decode_code = self._tokenizer.decode_code if self._decoder is None else self._decoder.decode_code
        return decode(tokens, self._tokenizer, decode_code, self._batch, self._output_type)
