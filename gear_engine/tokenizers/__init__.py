"""Image tokenizers: two coder families (VQGAN, MAGVIT2), three quantizers, one class around them."""

from __future__ import annotations

from gear_engine.tokenizers.decoder_fast import Decoder
from gear_engine.tokenizers.decoders import choose_decoder, decoder_name
from gear_engine.tokenizers.device_decoder import DeviceDecoder
from gear_engine.tokenizers.images import resize, to_uint8
from gear_engine.tokenizers.infer import from_module, infer_config
from gear_engine.tokenizers.quantizers import soft_readout
from gear_engine.tokenizers.tokenizer import Tokenizer, build_tokenizer

__all__ = [
    "Decoder",
    "DeviceDecoder",
    "Tokenizer",
    "build_tokenizer",
    "choose_decoder",
    "decoder_name",
    "from_module",
    "infer_config",
    "resize",
    "soft_readout",
    "to_uint8",
]
