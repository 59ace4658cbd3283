"""Converted folders: ``config.json``, ``generator.safetensors`` and ``tokenizer.safetensors``, either of them optional.

``config.json`` holds both configurations, each weight file's SHA-256 (compared when the folder is opened) and where the
weights came from. It is written last: a folder without it is no folder of ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from gear_engine.checkpoint.claims import settle
from gear_engine.checkpoint.formats import Kind, StateDict, find_weights
from gear_engine.checkpoint.infer_generator import GeneratorOverrides, infer_generator
from gear_engine.checkpoint.infer_tokenizer import TokenizerOverrides, infer_tokenizer
from gear_engine.checkpoint.safe_read import open_checkpoint
from gear_engine.checkpoint.safetensors_file import write_safetensors
from gear_engine.checkpoint.strict import check_names_and_shapes, expected_shapes, finisher
from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.errors import CheckpointError, ConfigError
from gear_engine.files import write_atomic
from gear_engine.models.transformer import Transformer
from gear_engine.tokenizers import build_tokenizer

__all__ = [
    "CONFIG_FILE",
    "KEPT_ARGS",
    "check_target",
    "folder_args",
    "folder_parts",
    "read_generator",
    "read_tokenizer",
    "write_folder",
]

CONFIG_FILE = "config.json"
#: What a text model needs to know beside its weights: which encoder, for how many tokens, in which precision.
KEPT_ARGS = ("text_encoder", "text_max_len", "mixed_precision")
_FORMAT, _VERSION = "gear_engine", 1
_MAX_CONFIG = 1 << 20
_MAX_NUMBER, _MAX_EMBED_DIM = 2**64, 2**16
#: What a configuration says and the weights' shapes do not.
_NOT_IN_SHAPES = {"block_size", "text_attn", "rope_base", "norm_eps", "num_codebooks", "codebook_l2_norm"}

Config = TypeVar("Config", GeneratorConfig, TokenizerConfig)

Model = tuple[GeneratorConfig | TokenizerConfig, Mapping[str, torch.Tensor], Mapping[str, Any]]


def check_target(folder: Path, *, force: bool) -> None:
    """Refuses a target that is a file, or not empty unless ``force``; writes nothing.

    Raises:
        CheckpointError: with what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise CheckpointError(f"{folder} is not empty; choose another folder, or force it to overwrite the model there")


def write_folder(folder: Path, models: Mapping[str, Model]) -> dict[str, Any]:
    """Writes ``{"generator": (config, state, source), "tokenizer": …}``; returns what config.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # Until all is written it is no model.
    description: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
    for kind in ("generator", "tokenizer"):
        path = folder / f"{kind}.safetensors"
        if kind not in models:
            path.unlink(missing_ok=True)
            continue
        config, state, source = models[kind]
        digest = write_safetensors(path, state, {"format": "pt"})
        description[kind] = {"config": config.to_dict(), "sha256": digest, "source": dict(source)}
    write_atomic(folder / CONFIG_FILE, (json.dumps(description, indent=2) + "\n").encode())
    return description


def _describe(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise CheckpointError(f"{path} is larger than a configuration can be")
        description = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is a folder without {CONFIG_FILE}; give a checkpoint, or a folder made by gear-engine convert"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise CheckpointError(f"{path} does not describe a {_FORMAT} model")
    if description.get("version") != _VERSION:
        raise CheckpointError(f"{path} has version {description.get('version')!r:.40}; this release reads {_VERSION}")
    return description


def folder_parts(folder: Path) -> list[str]:
    """``["generator", "tokenizer"]`` or one of them: what the folder holds."""
    description = _describe(folder)
    return [kind for kind in ("generator", "tokenizer") if kind in description]


def folder_args(folder: Path) -> dict[str, Any]:
    """Those training arguments of the generator that a converted folder keeps: :data:`KEPT_ARGS`."""
    entry = _describe(folder).get("generator")
    source = entry.get("source") if isinstance(entry, dict) else None
    args = source.get("args") if isinstance(source, dict) else None
    if not isinstance(args, dict):
        return {}
    return {name: args[name] for name in KEPT_ARGS if isinstance(args.get(name), (str, int))}


def _entry(folder: Path, kind: str) -> dict[str, Any]:
    entry = _describe(folder).get(kind)
    if entry is None:
        raise CheckpointError(f"{folder} holds no {kind}")
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise CheckpointError(f"{folder / CONFIG_FILE}: the {kind}'s entry has no configuration")
    return entry


def _check_digest(path: Path, expected: Any) -> None:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if digest != expected:
        raise CheckpointError(f"damaged: {path} has SHA-256 {digest}, but {CONFIG_FILE} says {expected!r:.80}")


def _read(
    folder: Path,
    kind: Kind,
    infer: Callable[[StateDict], Config],
    config: Config,
    build: Callable[[], torch.nn.Module],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    path = folder / f"{kind}.safetensors"
    _check_digest(path, _entry(folder, kind).get("sha256"))
    with open_checkpoint(path) as file:
        weights = find_weights(file.root, kind, ema=False)
        # Before anything of the configuration's size is built: it must be the weights' own.
        found = infer(weights.state).to_dict()
        for field, value in config.to_dict().items():
            if field not in _NOT_IN_SHAPES:
                settle(f"{kind}'s {field}", (CONFIG_FILE, value), (path.name, found[field]))
        expected = expected_shapes(build)
        check_names_and_shapes(expected, weights.state)
        wanted = {name: weights.state[name] for name in expected}
        return file.read_tensors(wanted, finisher(wanted, device, dtype))


def _config(folder: Path, kind: Kind, make: Callable[..., Config]) -> tuple[Config, dict[str, Any]]:
    entry = _entry(folder, kind)
    fields = entry["config"]
    # The width of a look-up-free code is an exponent.
    limits = {name: _MAX_EMBED_DIM if name == "codebook_embed_dim" else _MAX_NUMBER for name in fields}
    if any(isinstance(value, int) and abs(value) > limits[name] for name, value in fields.items()):
        raise CheckpointError(f"{folder / CONFIG_FILE}: the {kind}'s configuration has a number out of every range")
    try:
        config = make(**fields)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: the {kind}'s configuration is not possible: {error}") from error
    source = entry.get("source")
    return config, source if isinstance(source, dict) else {}


def read_generator(
    folder: Path, given: GeneratorOverrides, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[GeneratorConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """Configuration, weights and origin of the folder's generator; the user's overrides must agree."""
    config, source = _config(folder, "generator", GeneratorConfig)
    for field, value in (
        ("n_head", given.n_head),
        ("num_classes", given.num_classes),
        ("vocab_size", given.codebook_size),
        ("cls_token_num", given.cls_token_num),
        ("text_attn", given.text_attn),
    ):
        settle(field, (CONFIG_FILE, getattr(config, field)), (f"your {field}", value))
    if given.image_size is not None:
        tokens = (given.image_size // (given.downsample_ratio or 16)) ** 2
        settle("tokens per image", (CONFIG_FILE, config.block_size), (f"your image_size {given.image_size}", tokens))
    known = GeneratorOverrides(
        n_head=config.n_head,
        num_classes=config.num_classes if config.conditioning == "class" else None,
        cls_token_num=config.cls_token_num,
    )

    def infer(state: StateDict) -> GeneratorConfig:
        return infer_generator(state, {}, known)

    state = _read(folder, "generator", infer, config, lambda: Transformer(config), device, dtype)
    return config, state, source


def read_tokenizer(
    folder: Path, given: TokenizerOverrides, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[TokenizerConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """Configuration, weights and origin of the folder's tokenizer; the user's overrides must agree."""
    config, source = _config(folder, "tokenizer", TokenizerConfig)
    for field, value in (
        ("codebook_size", given.codebook_size),
        ("codebook_embed_dim", given.codebook_embed_dim),
        ("num_codebooks", given.num_codebooks),
        ("codebook_l2_norm", given.codebook_l2_norm),
        ("downsample", given.downsample_ratio),
    ):
        settle(field, (CONFIG_FILE, getattr(config, field)), (f"your {field}", value))

    def infer(state: StateDict) -> TokenizerConfig:
        return infer_tokenizer(state, {}, TokenizerOverrides())

    state = _read(folder, "tokenizer", infer, config, lambda: build_tokenizer(config), device, dtype)
    return config, state, source
