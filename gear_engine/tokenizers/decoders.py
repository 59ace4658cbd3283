"""The one place where a decoder is chosen: by the tokenizer's device and the arithmetic that is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gear_engine.tokenizers import decoder_fast
from gear_engine.tokenizers.decoder_fast import Decoder
from gear_engine.tokenizers.device_decoder import DeviceDecoder
from gear_engine.tokenizers.tokenizer import Tokenizer

__all__ = ["choose_decoder", "decoder_name"]


def choose_decoder(
    tokenizer: Tokenizer, dtype: torch.dtype | None, batch: int, backend: str | Mapping[str, str] = "auto"
) -> Decoder | DeviceDecoder | None:
    """What decodes the codes of ``tokenizer``, ``batch`` images at a time.

    Args:
        dtype: arithmetic of the convolutions over an fp32 tokenizer. None: the tokenizer's own; on a GPU an fp32
            tokenizer with one index per position is then decoded by captured steps in fp32.
        backend: of a :class:`DeviceDecoder`'s norms, as an engine takes it.

    Returns:
        A :class:`Decoder` on a CPU, a :class:`DeviceDecoder` elsewhere; both hold weights that ``refresh()`` reads
        again. None: :meth:`Tokenizer.decode_code` as it is.

    Raises:
        ConfigError, BackendUnavailableError: that device cannot decode so.
    """
    if tokenizer.device.type == "cpu":
        return None if dtype is None else Decoder(tokenizer, dtype=dtype)
    if dtype is None:
        if tokenizer.dtype != torch.float32 or tokenizer.config.num_codebooks != 1:
            return None
        dtype = torch.float32
    return DeviceDecoder(tokenizer, dtype=dtype, batch=batch, backend=backend)


def decoder_name(decoder: Decoder | DeviceDecoder | None, tokenizer: Tokenizer) -> str:
    """``"device"``, ``"cpu"``, or ``"reference"`` for the modules: what a record says of where pixels come from."""
    if isinstance(decoder, DeviceDecoder):
        return "device"
    plain = tokenizer.device.type == "cpu" and tokenizer.dtype == torch.float32
    return "cpu" if decoder is not None or (plain and decoder_fast.unavailable() is None) else "reference"
