"""Checkpoints: every published format, read safely, to a configuration and weights under the official keys."""

from __future__ import annotations

from gear_engine.checkpoint.contents import checkpoint_args, checkpoint_parts
from gear_engine.checkpoint.conversion import Conversion, convert
from gear_engine.checkpoint.infer_generator import GeneratorOverrides
from gear_engine.checkpoint.infer_tokenizer import TokenizerOverrides
from gear_engine.checkpoint.load import (
    ReadGenerator,
    ReadTokenizer,
    Source,
    load_generator,
    load_tokenizer,
    open_generator,
    open_tokenizer,
    read_generator,
    read_tokenizer,
)
from gear_engine.checkpoint.pair import Pair, check_pair, load_pair, save_pretrained
from gear_engine.files import content_hash as checkpoint_hash

__all__ = [
    "Conversion",
    "GeneratorOverrides",
    "Pair",
    "ReadGenerator",
    "ReadTokenizer",
    "Source",
    "TokenizerOverrides",
    "check_pair",
    "checkpoint_args",
    "checkpoint_hash",
    "checkpoint_parts",
    "convert",
    "load_generator",
    "load_pair",
    "load_tokenizer",
    "open_generator",
    "open_tokenizer",
    "read_generator",
    "read_tokenizer",
    "save_pretrained",
]
