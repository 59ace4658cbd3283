"""Small models and images for the training tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gear_engine.training import (
    AlignmentConfig,
    ArraySource,
    DataConfig,
    EncoderConfig,
    GeneratorSettings,
    LossConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)
from tests.checkpoint.files import VQ

SIZE = 8
CLASSES = 3

_VQ = VQ.replace(codebook_size=16, ch_mult=(1, 1))
TOKENIZERS = {
    "vq": _VQ,
    "ibq": _VQ.replace(family="ibq", codebook_embed_dim=6, z_channels=6, codebook_l2_norm=False),
    "lfq": _VQ.replace(family="lfq", codebook_embed_dim=4, z_channels=4, codebook_l2_norm=False),
}


def pictures(count: int = 24, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, size, size, 3] with a bright patch whose place tells the label, and the labels."""
    random = np.random.default_rng(5)
    labels = np.arange(count) % CLASSES
    images = random.integers(0, 60, (count, size, size, 3)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 3, 1 : size - 2] = random.integers(120, 255, 3)
    return images, labels


def config(stage: str, folder: Path | str = "unused", family: str = "vq", **changes: Any) -> TrainConfig:
    """A configuration whose sections can be replaced by keyword: ``loss={"adaptive": True}`` changes one field."""
    settings: dict[str, Any] = {
        "stage": stage,
        "steps": 6,
        "batch_size": 4,
        "tokenizer": TOKENIZERS[family],
        "generator": None if stage == "tokenizer" else GeneratorSettings(dim=16, n_layer=3, n_head=2, ffn_dim=32),
        "data": DataConfig(image_size=SIZE),
        "loss": LossConfig(perceptual="encoder", discriminator_channels=8, discriminator_layers=1),
        "alignment": AlignmentConfig(depth=2, projector_dim=16),
        "encoder": EncoderConfig(kind="small", width=16, steps=3, batch_size=8),
        "optimizer": OptimizerConfig(ema_decay=0.9),
        "output": OutputConfig(folder=str(folder), checkpoint_every=2, sample_every=0, log_every=1),
    }
    for name, value in changes.items():
        settings[name] = dataclasses.replace(settings[name], **value) if isinstance(value, dict) else value
    return TrainConfig(**settings)


def source(settings: TrainConfig, count: int = 24) -> ArraySource:
    images, labels = pictures(count)
    return ArraySource.make(images, labels, settings.data)
