"""The runs of the study: one warm-up that all share, then each recipe and seed from it, evaluated as it goes.

Every run leaves one JSON file when it is done; a run that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gear_engine.config import TokenizerConfig
from gear_engine.files import write_atomic
from gear_engine.training import ArraySource, TrainConfig, Trainer, config_from_table
from gear_engine.training.evaluation import Evaluation, as_record
from gear_engine.training.scenes import CLASS_NAMES, make_scenes

__all__ = ["RECIPES", "SETTINGS", "Settings", "run_recipe", "warm_up"]

#: Name in the results -> name in the text.
RECIPES: Final = {"gear": "GEAR", "llamagen-repa": "LlamaGen-REPA", "straight-through": "straight-through"}
_DATA_SEED: Final = 11
_NEVER: Final = 10**9


@dataclass(frozen=True)
class Settings:
    """Size of the study.

    Attributes:
        image_size: edge of the scenes in pixels.
        images: training scenes.
        warmup_steps: of the tokenizer alone, shared by all runs.
        steps: of every recipe after the warm-up; ``evaluations`` of them are measured, evenly spaced.
        batch_size: images per step.
        tokenizer, generator: sections of a training file.
        tau: temperature of the soft read-out.
        samples: images drawn per evaluation; ``restored``: held-out images reconstructed.
        encoder_steps: training of the encoder whose features are the alignment's targets.
    """

    image_size: int
    images: int
    warmup_steps: int
    steps: int
    evaluations: int
    batch_size: int
    tokenizer: dict[str, Any]
    generator: dict[str, Any]
    tau: float = 1.0
    samples: int = 512
    restored: int = 256
    encoder_steps: int = 100

    def replace(self, **changes: Any) -> Settings:
        return dataclasses.replace(self, **changes)


_NARROW: Final = {
    "family": "lfq", "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "downsample": 4, "z_channels": 9,
    "codebook_embed_dim": 9, "codebook_size": 512, "codebook_l2_norm": False,
}  # fmt: skip

SETTINGS: Final = {
    # As small as recognisable shapes allow, so that a processor is enough.
    "standard": Settings(
        image_size=16, images=4096, warmup_steps=500, steps=1200, evaluations=6, batch_size=16,
        tokenizer=_NARROW, generator={"dim": 128, "n_layer": 4, "n_head": 4},
    ),
    # The mechanism, in minutes.
    "quick": Settings(
        image_size=16, images=4096, warmup_steps=250, steps=400, evaluations=2, batch_size=16,
        tokenizer=_NARROW, generator={"dim": 128, "n_layer": 4, "n_head": 4}, samples=256, restored=128,
    ),
    # For a GPU.
    "large": Settings(
        image_size=64, images=32768, warmup_steps=20_000, steps=50_000, evaluations=25, batch_size=128,
        tokenizer=_NARROW | {"ch": 128, "ch_mult": [1, 1, 2, 2], "downsample": 8, "num_res_blocks": 2},
        generator={"dim": 512, "n_layer": 12, "n_head": 8}, samples=8192, restored=2048, encoder_steps=4000,
    ),
}  # fmt: skip


def _config(settings: Settings, folder: Path, seed: int, **sections: Any) -> TrainConfig:
    """A training file's content with what all runs of the study share."""
    table: dict[str, Any] = {
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "seed": seed,
        "tokenizer": TokenizerConfig(**settings.tokenizer).to_dict(),
        "data": {"image_size": settings.image_size, "flip": False},
        "encoder": {"kind": "small", "steps": settings.encoder_steps, "width": 64},
        "loss": {
            "perceptual": "encoder",
            "perceptual_weight": 0.2,
            "adversarial_weight": 0.0,
            "adversarial_start": _NEVER,
            "discriminator_channels": 8,
        },
        "alignment": {"depth": 2, "projector_dim": 128, "tau": settings.tau},
        "optimizer": {"tokenizer_lr": 2e-3, "generator_lr": 2e-3, "beta2": 0.95, "warmup_steps": 20, "ema_decay": 0.98},
        "output": {"folder": str(folder), "checkpoint_every": 50, "keep": 1, "sample_every": 0},
    }
    for name, section in sections.items():
        table[name] = table[name] | section if isinstance(section, dict) and name in table else section
    return config_from_table(table)


def _source(settings: Settings, config: TrainConfig) -> ArraySource:
    images, labels = make_scenes(settings.images, _DATA_SEED, settings.image_size)
    return ArraySource.make(images, labels, config.data, list(CLASS_NAMES))


def warm_up(settings: Settings, folder: Path) -> Path:
    """Trains the tokenizer that every recipe starts from, once; its checkpoint."""
    config = _config(settings, folder / "warm-up", seed=0, stage="tokenizer", steps=settings.warmup_steps)
    checkpoint = config.folder / "checkpoints" / f"{config.steps:07d}.pt"
    if not checkpoint.exists():
        trainer = Trainer(config, _source(settings, config), resume=True)
        for _ in trainer.run():
            pass
    return checkpoint


def _recipe(settings: Settings, name: str, seed: int, folder: Path, start: Path) -> TrainConfig:
    sections: dict[str, Any] = {"init": {"tokenizer": str(start)}, "generator": settings.generator}
    if name == "llamagen-repa":
        return _config(settings, folder, seed, stage="generator", **sections)
    branch = {"gear": "soft", "straight-through": "straight_through"}[name]
    return _config(settings, folder, seed, stage="joint", alignment={"branch": branch}, **sections)


def run_recipe(
    settings: Settings, name: str, seed: int, folder: Path, start: Path, evaluation: Evaluation, cfg_scale: float
) -> dict[str, Any]:
    """One recipe with one seed from the warm-up's checkpoint ``start``; its record, also in ``folder``.

    The record's ``curve`` holds an evaluation of the averaged weights at every measured step, ``log`` the losses there.
    """
    path = folder / f"{name}-{seed}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    config = _recipe(settings, name, seed, folder / f"{name}-{seed}", start)
    trainer = Trainer(config, _source(settings, config), resume=True)
    partial = config.folder / "curve.json"
    curve = json.loads(partial.read_text()) if partial.exists() else []
    curve = [point for point in curve if point["step"] <= trainer.step]
    every = settings.steps // settings.evaluations
    seconds, began = (curve[-1]["cpu_seconds"] if curve else 0.0), time.process_time()
    for record in trainer.run():
        if trainer.step % every:
            continue
        seconds += time.process_time() - began
        point = {"step": trainer.step, "cpu_seconds": seconds, "losses": record}
        point |= _measure(settings, trainer, evaluation, cfg_scale)
        curve.append(point)
        trainer.save()
        write_atomic(partial, json.dumps(curve).encode())
        began = time.process_time()
    result = {"recipe": name, "seed": seed, "cfg_scale": cfg_scale, "curve": curve}
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _measure(settings: Settings, trainer: Trainer, evaluation: Evaluation, cfg_scale: float) -> dict[str, Any]:
    generator, tokenizer = trainer.state.generator_ema, trainer.state.tokenizer_ema
    assert generator is not None
    samples = evaluation.samples(generator, tokenizer, count=settings.samples, cfg_scale=cfg_scale)
    restored = evaluation.reconstruction(tokenizer, settings.restored)
    return {"samples": as_record(samples), "reconstruction": as_record(restored)}
