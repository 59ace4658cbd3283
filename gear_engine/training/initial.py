"""Weights that a run starts from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gear_engine.checkpoint import checkpoint_parts, read_generator, read_tokenizer
from gear_engine.checkpoint.strict import check_names_and_shapes
from gear_engine.errors import CheckpointError, ConfigError
from gear_engine.runs.world import World
from gear_engine.training.config import TrainConfig
from gear_engine.training.data import ImageSource
from gear_engine.training.modules import Projectors
from gear_engine.training.small_encoder import SmallEncoder, read_small_encoder, train_small_encoder

if TYPE_CHECKING:
    from gear_engine.training.state import TrainState

__all__ = ["load_initial", "read_file", "small_encoder"]


def read_file(path: Path | str) -> dict[str, Any]:
    """What a checkpoint of ours holds; no code in it is run.

    Raises:
        CheckpointError: unreadable, or not a dictionary of plain values and tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a training checkpoint")
    return found


def load_initial(state: TrainState) -> Any:
    """Puts the weights of ``config.init`` into the fresh models; returns the ``encoder`` entry found there, or None."""
    init = state.config.init
    encoder = None
    if init.tokenizer:
        _load_tokenizer(state)
        encoder = _load_beside(state, init.tokenizer)
    if init.generator:
        _load_generator(state)
    return encoder


def _load_tokenizer(state: TrainState) -> None:
    init, config = state.config.init, state.config
    wanted = [init.use_ema] if config.stage == "generator" else [False, True]
    for ema in wanted:
        found = read_tokenizer(init.tokenizer, ema=ema)
        if found.config != config.tokenizer:
            difference = next(k for k, v in found.config.to_dict().items() if v != getattr(config.tokenizer, k))
            raise ConfigError(
                f"the tokenizer in {init.tokenizer} has {difference} = {getattr(found.config, difference)}, "
                f"this run's has {getattr(config.tokenizer, difference)}"
            )
        if ema and config.stage != "generator":
            state.tokenizer_ema = copy.deepcopy(state.tokenizer)
        target = state.tokenizer_ema if ema else state.tokenizer
        target.load_state_dict(found.state, strict=True)


def _load_beside(state: TrainState, path: str) -> Any:
    """Discriminator and encoder of one of our files; other publishers' files have neither."""
    if not Path(path).is_file() or Path(path).suffix == ".safetensors":
        return None
    stored = read_file(path)
    if state.discriminator is not None and "discriminator" in stored:
        expected = {name: tuple(t.shape) for name, t in state.discriminator.state_dict().items()}
        check_names_and_shapes(expected, stored["discriminator"])
        state.discriminator.load_state_dict(stored["discriminator"])
    return stored.get("encoder")


def _load_generator(state: TrainState) -> None:
    init = state.config.init
    if state.generator is None:
        raise ConfigError("init.generator is set, but the tokenizer stage has no generator")
    config = state.generator.config
    if "generator" not in checkpoint_parts(Path(init.generator)):
        raise CheckpointError(f"{init.generator} holds no generator (init.generator)")
    found = read_generator(init.generator, ema=init.use_ema, n_head=config.n_head)
    if found.config.replace(block_size=config.block_size) != config:
        raise ConfigError(f"the generator in {init.generator} is {found.config}, this run's is {config}")
    state.generator.load_state_dict(found.state, strict=True)
    stored = read_file(init.generator) if Path(init.generator).is_file() else {}
    if "projectors" in stored and state.config.aligns:
        weights = stored["projectors"]
        last = max(int(name.split(".")[2]) for name in weights)
        state.projectors = Projectors(
            config.dim, weights["projs.0.0.weight"].shape[0], weights[f"projs.0.{last}.weight"].shape[0]
        )
        state.projectors.load_state_dict(weights)


def small_encoder(
    config: TrainConfig,
    source: ImageSource,
    world: World,
    device: torch.device,
    report: Callable[[dict[str, Any]], None],
    stored: Any,
) -> SmallEncoder:
    """The run's small encoder: of ``config.encoder.path``, else of the file it starts from, else trained here.

    With several processes the first one trains it and the others take its weights.
    """
    downsample = config.tokenizer.downsample
    if config.encoder.path:
        stored, where = read_file(config.encoder.path).get("encoder"), config.encoder.path
        return read_small_encoder(stored, config.encoder, downsample, where)
    if stored is not None:
        return read_small_encoder(stored, config.encoder, downsample, config.init.tokenizer)
    if world.is_main:
        encoder = train_small_encoder(config, source, device, report)
    else:
        encoder = SmallEncoder(config.encoder.width, downsample, len(source.class_names)).to(device)
        encoder.eval().requires_grad_(False)
    if world.size > 1:
        for tensor in encoder.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
    return encoder
