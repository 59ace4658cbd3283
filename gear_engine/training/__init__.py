"""GEAR's training recipe: tokenizer warm-up, joint training through the dual read-out, generator on a frozen tokenizer.

    from gear_engine.training import ArraySource, TrainConfig, Trainer, load_config

    config = load_config("joint.toml")                      # or TrainConfig(...); config.replace(steps=..., seed=...)
    source = ArraySource.make(images, labels, config.data)   # uint8 [N, H, W, 3], [N]; or leave it to config.data.path
    trainer = Trainer(config, source, resume=True)
    for record in trainer.run():                            # one item per step; a dict at logged steps, else None
        if trainer.step % 500 == 0:
            evaluate(trainer.state.tokenizer_ema, trainer.state.generator_ema)   # ordinary modules of gear_engine

``trainer.run(until=n)`` stops early and can be called again. ``write=False`` keeps everything off the disk. Baselines:
``stage = "generator"`` with an alignment is LlamaGen-REPA on a frozen tokenizer; ``alignment.branch =
"straight_through"`` is the joint stage with hard vectors forward. Runs with the same seed and batch size see the same
images in the same order. A small encoder is shared between runs by ``Trainer(..., encoder=trainer.state.encoder)``, by
``encoder.path``, or by ``init.tokenizer``, whose file carries it.
"""

from __future__ import annotations

from gear_engine.training.config import TrainConfig
from gear_engine.training.config_file import config_from_table, load_config
from gear_engine.training.data import ArraySource, FolderSource, ImageSource, open_source
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
from gear_engine.training.small_encoder import SmallEncoder, train_small_encoder
from gear_engine.training.trainer import Trainer

__all__ = [
    "AlignmentConfig",
    "ArraySource",
    "DataConfig",
    "EncoderConfig",
    "FolderSource",
    "GeneratorSettings",
    "ImageSource",
    "InitConfig",
    "LossConfig",
    "OptimizerConfig",
    "OutputConfig",
    "SmallEncoder",
    "TrainConfig",
    "Trainer",
    "config_from_table",
    "load_config",
    "open_source",
    "train_small_encoder",
]
