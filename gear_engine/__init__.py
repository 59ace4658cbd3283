"""Fast, exact inference for GEAR and LlamaGen autoregressive image models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gear_engine.checkpoint import load_generator, load_tokenizer
    from gear_engine.compat import decode_code, generate, generate_t2i, release
    from gear_engine.config import GENERATOR_PRESETS, TOKENIZER_PRESETS, GeneratorConfig, TokenizerConfig
    from gear_engine.engine import Engine, FinishedImage
    from gear_engine.errors import (
        BackendUnavailableError,
        CheckpointError,
        ConfigError,
        GearError,
        InvalidRequestError,
        NumericalError,
        OutOfMemoryError,
        ResumeMismatchError,
        UnsafeCheckpointError,
    )
    from gear_engine.memory import images_that_fit
    from gear_engine.models.condition import TextCondition
    from gear_engine.models.transformer import Transformer
    from gear_engine.pipeline import Pipeline, PipelineOutput
    from gear_engine.request import ImageRequest, SamplingParams
    from gear_engine.tokenizers import Tokenizer, build_tokenizer

__version__ = "0.1.0"

__all__ = [
    "GENERATOR_PRESETS",
    "TOKENIZER_PRESETS",
    "BackendUnavailableError",
    "CheckpointError",
    "ConfigError",
    "Engine",
    "FinishedImage",
    "GearError",
    "GeneratorConfig",
    "ImageRequest",
    "InvalidRequestError",
    "NumericalError",
    "OutOfMemoryError",
    "Pipeline",
    "PipelineOutput",
    "ResumeMismatchError",
    "SamplingParams",
    "TextCondition",
    "Tokenizer",
    "TokenizerConfig",
    "Transformer",
    "UnsafeCheckpointError",
    "build_tokenizer",
    "decode_code",
    "generate",
    "generate_t2i",
    "images_that_fit",
    "load_generator",
    "load_tokenizer",
    "release",
]

_ERRORS = {name: "errors" for name in __all__ if name.endswith("Error")}
#: Public name -> module. Modules load on first use, so that `import gear_engine` and the command line start at once.
_HOMES = _ERRORS | {
    "GENERATOR_PRESETS": "config",
    "TOKENIZER_PRESETS": "config",
    "Engine": "engine",
    "FinishedImage": "engine",
    "GeneratorConfig": "config",
    "ImageRequest": "request",
    "Pipeline": "pipeline",
    "PipelineOutput": "pipeline",
    "SamplingParams": "request",
    "TextCondition": "models.condition",
    "Tokenizer": "tokenizers",
    "TokenizerConfig": "config",
    "Transformer": "models.transformer",
    "build_tokenizer": "tokenizers",
    "decode_code": "compat",
    "generate": "compat",
    "generate_t2i": "compat",
    "images_that_fit": "memory",
    "load_generator": "checkpoint",
    "load_tokenizer": "checkpoint",
    "release": "compat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
