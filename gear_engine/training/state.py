"""Everything that changes while a model is trained, and how it is made at the start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gear_engine.config import GeneratorConfig
from gear_engine.errors import ConfigError
from gear_engine.models.transformer import Transformer
from gear_engine.runs.world import World
from gear_engine.tokenizers import Tokenizer, build_tokenizer
from gear_engine.tokenizers.quantizers import VectorQuantizer
from gear_engine.training.config import TrainConfig
from gear_engine.training.data import ImageSource
from gear_engine.training.discriminator import Discriminator
from gear_engine.training.encoders import Dinov2Targets, SmallTargets, TargetEncoder
from gear_engine.training.initial import load_initial, small_encoder
from gear_engine.training.modules import DiscriminatorPass, GeneratorPass, Projectors, TokenizerPass
from gear_engine.training.optimizers import Optimizer, make_optimizer
from gear_engine.training.perceptual import PerceptualLoss, SmallPerceptual, load_lpips
from gear_engine.training.small_encoder import SmallEncoder

__all__ = ["TrainState", "build_state"]


@dataclass
class TrainState:
    """The models of a run.

    Attributes:
        step: optimizer steps done.
        tokenizer, tokenizer_ema: trained in the tokenizer and joint stages; frozen in the generator stage, where both
            are the same module.
        generator, generator_ema: None in the tokenizer stage. ``projectors``: None without alignment.
        discriminator: None in the generator stage; ``lecam`` [2] are the running means of its logits.
        encoder: the run's own small encoder, if it has one; ``targets`` and ``perceptual`` read it, or other weights.
        optimizers: by the official trainers' names: ``"vq"``, ``"disc"``, ``"ar"``.
        passes: the forward passes by the same names, wrapped for several processes.
    """

    config: TrainConfig
    world: World
    device: torch.device
    tokenizer: Tokenizer
    tokenizer_ema: Tokenizer
    generator: Transformer | None = None
    generator_ema: Transformer | None = None
    projectors: Projectors | None = None
    discriminator: nn.Module | None = None
    encoder: SmallEncoder | None = None
    targets: TargetEncoder | None = None
    perceptual: PerceptualLoss | None = None
    lecam: torch.Tensor = field(default_factory=lambda: torch.zeros(2))
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    passes: dict[str, nn.Module] = field(default_factory=dict)
    step: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float64 if self.config.precision == "fp64" else torch.float32


def build_state(
    config: TrainConfig,
    source: ImageSource,
    world: World,
    device: torch.device,
    report: Callable[[dict[str, Any]], None],
    encoder: SmallEncoder | None = None,
) -> TrainState:
    """The models at step 0: from the seed, and from the files that ``config.init`` names.

    Args:
        encoder: a small encoder that is there already; by default it is read or trained as ``config.encoder`` says.

    Raises:
        ConfigError: settings that the data or this machine do not allow.
        MissingWeightsError, CheckpointError: weights that are not there or do not fit.
    """
    classes = len(source.class_names)
    batch_norm = config.stage != "generator" and config.loss.discriminator_norm == "batch"
    if world.size > 1 and device.type == "cpu" and batch_norm:
        raise ConfigError(
            "torch synchronises batch norm on GPUs only: set loss.discriminator_norm = 'group', or use one process"
        )
    if config.generator is not None and 0 < config.generator.num_classes < classes:
        raise ConfigError(f"generator.num_classes {config.generator.num_classes} is below the {classes} classes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        state = _fresh_models(config, world, device, classes)
    stored_encoder = load_initial(state)
    if config.encoder.kind == "small":
        state.encoder = encoder or small_encoder(config, source, world, device, report, stored_encoder)
        state.encoder.to(device=device, dtype=state.dtype)
    _attach_encoders(state)
    _attach_training(state)
    return state


def _fresh_models(config: TrainConfig, world: World, device: torch.device, classes: int) -> TrainState:
    tokenizer = build_tokenizer(config.tokenizer)
    if isinstance(tokenizer.quantize, VectorQuantizer):
        tokenizer.quantize.reset_parameters()
    tokenizer.quantize.entropy_loss_ratio = config.loss.entropy_ratio
    tokenizer.quantize.beta = config.loss.commitment
    state = TrainState(config, world, device, tokenizer, tokenizer)
    if config.stage != "generator":
        loss = config.loss
        state.discriminator = Discriminator(
            loss.discriminator_channels, loss.discriminator_layers, loss.discriminator_norm
        )
    if config.generator is not None:
        state.generator = Transformer(_generator_config(config, classes))
    return state


def _generator_config(config: TrainConfig, classes: int) -> GeneratorConfig:
    assert config.generator is not None
    return config.generator.resolve(config.tokenizer, config.data.image_size, config.generator.num_classes or classes)


def _attach_encoders(state: TrainState) -> None:
    config = state.config
    grid = config.data.image_size // config.tokenizer.downsample
    if config.aligns:
        if state.encoder is not None:
            state.targets = SmallTargets(state.encoder)
        else:
            state.targets = Dinov2Targets(config.encoder, grid, state.device)
    if config.stage != "generator" and config.loss.perceptual_weight > 0:
        if config.loss.perceptual == "lpips":
            state.perceptual = load_lpips(config.loss.lpips_vgg, config.loss.lpips_linear).to(state.device, state.dtype)
        elif config.loss.perceptual == "encoder":
            assert state.encoder is not None
            state.perceptual = SmallPerceptual(state.encoder)


def _attach_training(state: TrainState) -> None:
    """Moves the models to the device and makes averages, passes and optimizers."""
    config, settings = state.config, state.config.optimizer
    for module in (state.tokenizer, state.tokenizer_ema, state.generator, state.generator_ema, state.discriminator):
        if module is not None:
            module.to(device=state.device, dtype=state.dtype)
    state.lecam = state.lecam.to(state.device, state.dtype)
    if config.stage == "generator":
        state.tokenizer.eval().requires_grad_(False)
    else:
        state.tokenizer.train().requires_grad_(True)
        if state.tokenizer_ema is state.tokenizer:
            state.tokenizer_ema = copy.deepcopy(state.tokenizer)
        state.tokenizer_ema.eval().requires_grad_(False)
        assert isinstance(state.discriminator, Discriminator)
        state.passes["vq"] = _wrapped(TokenizerPass(state.tokenizer, config.alignment), state)
        state.optimizers["vq"] = make_optimizer(
            state.tokenizer.parameters(), settings.tokenizer_lr, settings, config.steps
        )
        # Batch norm sees the whole batch in every process, as it would in one.
        if state.world.size > 1 and config.loss.discriminator_norm == "batch":
            state.discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(state.discriminator)
        state.passes["disc"] = _wrapped(DiscriminatorPass(state.discriminator), state)
        state.optimizers["disc"] = make_optimizer(
            state.discriminator.parameters(), settings.discriminator_lr, settings, config.steps
        )
    if state.generator is not None:
        state.generator.train().requires_grad_(True)
        if state.generator_ema is None:
            state.generator_ema = copy.deepcopy(state.generator)
        state.generator_ema.eval().requires_grad_(False)
        _attach_generator(state, state.generator)


def _attach_generator(state: TrainState, generator: Transformer) -> None:
    config, settings = state.config, state.config.optimizer
    parameters = list(generator.parameters())
    if state.targets is not None:
        if state.projectors is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed + 1)
                state.projectors = Projectors(generator.config.dim, config.alignment.projector_dim, state.targets.dim)
        if state.projectors.out_dim != state.targets.dim:
            raise ConfigError(
                f"the projector in {config.init.generator} leads to {state.projectors.out_dim} dimensions, the encoder "
                f"has {state.targets.dim}"
            )
        state.projectors.to(device=state.device, dtype=state.dtype)
        parameters += list(state.projectors.parameters())
    state.passes["ar"] = _wrapped(GeneratorPass(generator, state.projectors, config.alignment.depth), state)
    state.optimizers["ar"] = make_optimizer(parameters, settings.generator_lr, settings, config.steps)


def _wrapped(module: nn.Module, state: TrainState) -> nn.Module:
    """The pass as it is, or in DistributedDataParallel."""
    if state.world.size == 1:
        return module
    devices = None if state.device.type == "cpu" else [state.device]
    return nn.parallel.DistributedDataParallel(module, device_ids=devices)
