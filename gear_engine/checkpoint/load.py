"""From a checkpoint of any published format to a configuration, weights or a module."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gear_engine.checkpoint import folder
from gear_engine.checkpoint.formats import Kind, Weights, contains, find_weights, saved_args
from gear_engine.checkpoint.infer_generator import GeneratorOverrides, infer_generator
from gear_engine.checkpoint.infer_tokenizer import TokenizerOverrides, infer_tokenizer
from gear_engine.checkpoint.named_tokenizer import open_named_tokenizer
from gear_engine.checkpoint.safe_read import CheckpointFile, open_checkpoint
from gear_engine.checkpoint.strict import assign, check_names_and_shapes, expected_shapes, finisher, on_meta
from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.errors import CheckpointError, ConfigError
from gear_engine.hub import local_path
from gear_engine.models.transformer import Transformer
from gear_engine.tokenizers import Tokenizer, build_tokenizer

__all__ = [
    "ReadGenerator",
    "ReadTokenizer",
    "Source",
    "load_generator",
    "load_tokenizer",
    "open_generator",
    "open_tokenizer",
    "read_generator",
    "read_tokenizer",
]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """Where weights came from.

    Attributes:
        path: the file that holds them.
        section: their place in it (``"ema"``, ``"vq"`` …).
        is_ema: EMA or live weights.
        has_args: whether the file has the training program's arguments.
        verified: whether the bytes were compared with checksums.
        notes: what a user should know (no EMA in the file, the default image size was taken …).
    """

    path: str
    section: str
    is_ema: bool
    has_args: bool
    verified: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = "EMA" if self.is_ema else "live"
        return "; ".join((f"{kind} weights from {self.section} of {self.path}", *self.notes))

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "section": self.section,
            "ema": self.is_ema,
            "has_args": self.has_args,
            "verified": self.verified,
            "notes": list(self.notes),
        }


class ReadGenerator(NamedTuple):
    """A generator's configuration, its weights under the official keys, and where they came from."""

    config: GeneratorConfig
    state: dict[str, torch.Tensor]
    source: Source


class ReadTokenizer(NamedTuple):
    """A tokenizer's configuration, its weights under the official keys, and where they came from."""

    config: TokenizerConfig
    state: dict[str, torch.Tensor]
    source: Source


@dataclass
class _Plan:
    """What is to be read from an open file: settled and checked, nothing allocated yet."""

    config: Any
    weights: Weights
    source: Source
    expected: Mapping[str, tuple[int, ...]] = field(repr=False)


def _plan(
    file: CheckpointFile, kind: Kind, ema: bool, infer: Callable[[Weights, dict[str, Any]], tuple[Any, list[str]]]
) -> _Plan:
    args = saved_args(file.root)
    weights = find_weights(file.root, kind, ema=ema)
    config, notes = infer(weights, args)
    build: Callable[[], torch.nn.Module] = (
        (lambda: Transformer(config)) if kind == "generator" else (lambda: build_tokenizer(config))
    )
    try:
        expected = expected_shapes(build)
    except (ConfigError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the weights' shapes are no possible {kind}: {error}") from error
    check_names_and_shapes(expected, weights.state)
    if weights.note:
        notes.insert(0, weights.note)
    source = Source(str(file.path), weights.section, weights.is_ema, bool(args), file.verified, tuple(notes))
    return _Plan(config, weights, source, expected)


def _plan_generator(file: CheckpointFile, ema: bool, given: GeneratorOverrides) -> _Plan:
    def infer(weights: Weights, args: dict[str, Any]) -> tuple[GeneratorConfig, list[str]]:
        bundled = None
        if contains(file.root, "tokenizer") and contains(file.root, "generator"):
            state = find_weights(file.root, "tokenizer", ema=True).state
            bundled = infer_tokenizer(state, {}, TokenizerOverrides()).downsample
        config = infer_generator(weights.state, args, given, bundled)
        notes = []
        if given.image_size is None and args.get("image_size") is None:
            notes.append("the image size is not in the file: 256 pixels are assumed (image_size says otherwise)")
        return config, notes

    return _plan(file, "generator", ema, infer)


def _plan_tokenizer(file: CheckpointFile, ema: bool, given: TokenizerOverrides) -> _Plan:
    def infer(weights: Weights, args: dict[str, Any]) -> tuple[TokenizerConfig, list[str]]:
        return infer_tokenizer(weights.state, args, given), []

    return _plan(file, "tokenizer", ema, infer)


def _read(
    file: CheckpointFile, plan: _Plan, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    wanted = {name: plan.weights.state[name] for name in plan.expected}
    return file.read_tensors(wanted, finisher(wanted, device, dtype))


def read_generator(
    path: PathLike,
    *,
    ema: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> ReadGenerator:
    """Reads a generator's configuration and weights; nothing else in the file is loaded.

    Args:
        path: a checkpoint of any published format, a converted folder, or ``org/name@revision`` on the hub.
        ema: EMA weights where the file has them, else live ones (said in the source); False: live ones only.
        device: where the tensors go; CPU by default.
        dtype: what they become; by default they stay as they are.
        **overrides: see :class:`GeneratorOverrides`; each must agree with the file.

    Raises:
        CheckpointError: unreadable, damaged, of another architecture, incomplete, misshapen, or not finite.
        UnsafeCheckpointError: it asks for code to be run or for memory that its size cannot justify.
    """
    given, path = GeneratorOverrides(**overrides), local_path(path)
    if path.is_dir():
        config, state, source = folder.read_generator(path, given, device, dtype)
        return ReadGenerator(config, state, _folder_source(path, source, ema))
    with open_checkpoint(path) as file:
        plan = _plan_generator(file, ema, given)
        return ReadGenerator(plan.config, _read(file, plan, device, dtype), plan.source)


def read_tokenizer(
    path: PathLike,
    *,
    ema: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> ReadTokenizer:
    """Reads a tokenizer's configuration and weights.

    A generator's file without a tokenizer (stage 2) leads to the one that its ``args`` name: the one bundled in
    ``args.ar_init_ckpt`` if ``args.vq_override_from_ar_init``, else ``args.vq_ckpt``.

    Args and errors as in :func:`read_generator`; overrides see :class:`TokenizerOverrides`.
    """
    given, path = TokenizerOverrides(**overrides), local_path(path)
    if path.is_dir():
        config, state, source = folder.read_tokenizer(path, given, device, dtype)
        return ReadTokenizer(config, state, _folder_source(path, source, ema))
    with open_checkpoint(path) as file:
        if contains(file.root, "tokenizer") or not contains(file.root, "generator"):
            plan = _plan_tokenizer(file, ema, given)
            return ReadTokenizer(plan.config, _read(file, plan, device, dtype), plan.source)
        args = saved_args(file.root)
    with open_named_tokenizer(path, args) as (file, note):
        plan = _plan_tokenizer(file, ema, given)
        notes = [*plan.source.notes, note]
        trained_with = args.get("vq_use_ema")
        if isinstance(trained_with, bool) and trained_with != plan.source.is_ema:
            notes.append(f"the generator was trained with the tokenizer's {'EMA' if trained_with else 'live'} weights")
        named = dataclasses.replace(plan.source, notes=tuple(notes))
        return ReadTokenizer(plan.config, _read(file, plan, device, dtype), named)


def open_generator(
    path: PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    ema: bool = True,
    **overrides: Any,
) -> tuple[Transformer, Source]:
    """:func:`load_generator` and where the weights came from."""
    config, state, source = read_generator(path, ema=ema, device=device, dtype=dtype, **overrides)
    module = on_meta(lambda: Transformer(config))
    assign(module, state)
    return module, source


def open_tokenizer(
    path: PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    ema: bool = True,
    **overrides: Any,
) -> tuple[Tokenizer, Source]:
    """:func:`load_tokenizer` and where the weights came from."""
    config, state, source = read_tokenizer(path, ema=ema, device=device, dtype=dtype, **overrides)
    module = on_meta(lambda: build_tokenizer(config))
    assign(module, state)
    return module, source


def load_generator(
    path: PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    ema: bool = True,
    **overrides: Any,
) -> Transformer:
    """The generator of a checkpoint, ready for inference (evaluation mode, no gradients).

    Class- or text-conditional is found from the file; so is the architecture, from the saved arguments and the shapes.
    The tensors are read once, straight to their place.

    Args and errors as in :func:`read_generator`.
    """
    return open_generator(path, device, dtype, ema=ema, **overrides)[0]


def load_tokenizer(
    path: PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    ema: bool = True,
    **overrides: Any,
) -> Tokenizer:
    """The tokenizer of a checkpoint (VQ, IBQ, LFQ or GLFQ, found from the file), ready for inference.

    Args and errors as in :func:`read_tokenizer`.
    """
    return open_tokenizer(path, device, dtype, ema=ema, **overrides)[0]


def _folder_source(path: Path, origin: Mapping[str, Any], ema: bool) -> Source:
    """A converted folder's source: the choice between EMA and live weights was made when it was written."""
    was_ema = bool(origin.get("ema", True))
    if not ema and was_ema:
        raise CheckpointError(
            f"{path} was converted from EMA weights and holds no live ones; convert with live weights"
        )
    section = str(origin.get("section", "a module"))[:80]
    return Source(str(path), section, was_ema, bool(origin.get("has_args")), True)
