"""What a training run is: one stage with its sections, checked against each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gear_engine.config import TokenizerConfig
from gear_engine.training.checks import at_least, one_of, require
from gear_engine.training.sections import (
    AlignmentConfig,
    DataConfig,
    EncoderConfig,
    GeneratorSettings,
    InitConfig,
    LossConfig,
    OptimizerConfig,
    OutputConfig,
)

__all__ = ["Stage", "TrainConfig"]

Stage = Literal["tokenizer", "joint", "generator"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of one stage.

    Attributes:
        stage: ``"tokenizer"`` (stage 0), ``"joint"`` (stage 1) or ``"generator"`` (stage 2).
        steps, batch_size: optimizer steps; images per step over all processes.
        seed: of initial weights, order, augmentation and dropout.
        precision: ``"fp32"``, ``"bf16"`` (autocast, fp32 weights) or ``"fp64"`` (to check the mathematics).
        tokenizer: its configuration.
        generator: None in the ``"tokenizer"`` stage.
    """

    stage: Stage
    steps: int
    batch_size: int
    tokenizer: TokenizerConfig
    generator: GeneratorSettings | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        one_of(self, "stage", ("tokenizer", "joint", "generator"))
        one_of(self, "precision", ("fp32", "bf16", "fp64"))
        at_least(self, 1, "steps", "batch_size")
        at_least(self, 0, "seed")
        self.tokenizer.latent_size(self.data.image_size, self.data.image_size)
        if self.stage == "tokenizer":
            require(self.generator is None, "the tokenizer stage has no generator: leave the section out")
        else:
            require(self.generator is not None, f"the {self.stage} stage needs a generator section")
        if self.generator is not None:
            config = self.generator.resolve(self.tokenizer, self.data.image_size, max(1, self.generator.num_classes))
            depth = self.alignment.depth
            require(
                not self.aligns or depth <= config.n_layer,
                f"alignment.depth {depth} is beyond the generator's {config.n_layer} blocks",
            )
        if self.stage == "joint":
            require(self.encoder.kind != "none", "the joint stage aligns to an encoder: encoder.kind is 'none'")
        if self.stage == "generator":
            require(bool(self.init.tokenizer), "the generator stage needs init.tokenizer, the frozen tokenizer's file")
        elif self.loss.perceptual == "encoder":
            require(self.encoder.kind == "small", "loss.perceptual = 'encoder' needs encoder.kind = 'small'")

    @property
    def aligns(self) -> bool:
        """Whether hidden states are aligned with an encoder's features."""
        return self.stage != "tokenizer" and self.encoder.kind != "none"

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for records and checkpoints."""
        return dataclasses.asdict(self)

    @property
    def folder(self) -> Path:
        return Path(self.output.folder)
