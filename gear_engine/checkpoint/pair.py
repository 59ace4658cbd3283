"""A generator and the tokenizer that draws its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gear_engine.checkpoint.folder import check_target, write_folder
from gear_engine.checkpoint.load import PathLike, Source, open_generator, open_tokenizer
from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.errors import CheckpointError
from gear_engine.models.transformer import Transformer
from gear_engine.tokenizers import Tokenizer

__all__ = ["Pair", "check_pair", "load_pair", "save_pretrained"]


@dataclass(frozen=True)
class Pair:
    """A generator, its tokenizer, and where each came from."""

    generator: Transformer
    tokenizer: Tokenizer
    generator_source: Source
    tokenizer_source: Source


def check_pair(generator: GeneratorConfig, tokenizer: TokenizerConfig) -> None:
    """Raises :class:`CheckpointError` unless every token of the generator is a code of the tokenizer."""
    if tokenizer.num_codebooks != 1:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.num_codebooks} indices per position; the generator draws one"
        )
    if generator.vocab_size != tokenizer.codebook_size:
        raise CheckpointError(
            f"the generator's vocabulary is {generator.vocab_size}, but the tokenizer has {tokenizer.codebook_size} "
            "codes: they do not belong together"
        )


def load_pair(
    path: PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    tokenizer: PathLike | None = None,
    ema: bool = True,
    tokenizer_ema: bool | None = None,
    tokenizer_overrides: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Pair:
    """Loads a generator and its tokenizer.

    Args:
        path: the generator's checkpoint or converted folder.
        device, dtype: as in :func:`load_generator`, for both.
        tokenizer: the tokenizer's file; by default the one in ``path``, else the one that its ``args`` name.
        ema: EMA weights where there are any.
        tokenizer_ema: the same for the tokenizer; by default as ``ema``.
        tokenizer_overrides: see :class:`TokenizerOverrides`.
        **overrides: see :class:`GeneratorOverrides`.

    Raises:
        CheckpointError: as :func:`read_generator`; or the tokenizer is not reachable, or the two do not fit.
    """
    module, source = open_generator(path, device, dtype, ema=ema, **overrides)
    codes, codes_source = open_tokenizer(
        path if tokenizer is None else tokenizer,
        device,
        dtype,
        ema=ema if tokenizer_ema is None else tokenizer_ema,
        **(tokenizer_overrides or {}),
    )
    check_pair(module.config, codes.config)
    return Pair(module, codes, source, codes_source)


def save_pretrained(
    folder: PathLike,
    generator: Transformer | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    force: bool = False,
) -> None:
    """Writes a folder (config.json and safetensors) that the load functions and ``Pipeline.from_pretrained`` open.

    Files appear whole or not at all, and config.json last.

    Raises:
        CheckpointError: nothing to write, the two do not fit, or the folder is not empty and ``force`` is not given.
    """
    if generator is None and tokenizer is None:
        raise CheckpointError("nothing to save: give a generator, a tokenizer, or both")
    if generator is not None and tokenizer is not None:
        check_pair(generator.config, tokenizer.config)
    target = Path(folder)
    check_target(target, force=force)
    origin = {"section": "a module", "ema": False}
    models = {"generator": generator, "tokenizer": tokenizer}
    write_folder(
        target,
        {kind: (module.config, module.state_dict(), origin) for kind, module in models.items() if module is not None},
    )
