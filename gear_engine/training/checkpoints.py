"""Checkpoints of a run: the official formats, written atomically, with what an exact continuation needs.

A file has the official trainer's entries, so that ``gear-engine sample``, this package's loaders and the official
programs read it:

* tokenizer stage: ``vq, vq_ema, discriminator, opt_vq, opt_disc, sched_vq, sched_disc, args, steps, stage = 0``;
* joint stage: those (without ``stage``) and ``ar, ema, projectors, opt_ar, sched_ar``;
* generator stage: ``ar, ema, projectors, opt, sched, args, steps``; ``args.vq_ckpt`` names the tokenizer's file.

Entries of ours: ``encoder`` (the small encoder) and ``resume`` (settings, the data's fingerprint, LeCam's means). No
generator state is stored: order, augmentation and dropout of a step follow from the seed and the step's number.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gear_engine.config import GENERATOR_PRESETS, TOKENIZER_PRESETS
from gear_engine.errors import CheckpointError, ResumeMismatchError
from gear_engine.files import atomic_file, remove_temporaries
from gear_engine.runs.record import first_difference
from gear_engine.training.config import TrainConfig
from gear_engine.training.initial import read_file
from gear_engine.training.state import TrainState

__all__ = ["contents", "latest_checkpoint", "official_args", "restore", "save"]

_FOLDER = "checkpoints"
#: Settings that decide no number of the run, or may be prolonged.
_FREE = ("steps", "output", "data.workers", "data.path", "loss.lpips_vgg", "loss.lpips_linear", "encoder.path")
_LOG_SUFFIX = ".pt"


def _path(config: TrainConfig, step: int) -> Path:
    return config.folder / _FOLDER / f"{step:07d}{_LOG_SUFFIX}"


def _all(config: TrainConfig) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in (config.folder / _FOLDER).glob(f"*{_LOG_SUFFIX}") if p.stem.isdigit())


def latest_checkpoint(config: TrainConfig) -> Path | None:
    """The newest checkpoint in the run's folder, or None."""
    found = _all(config)
    return found[-1] if found else None


def save(state: TrainState, fingerprint: str) -> Path:
    """Writes the checkpoint of ``state.step`` and removes the oldest ones beyond ``output.keep``.

    The file appears whole or not at all, and older ones go only after it has reached the disk.
    """
    config = state.config
    path = _path(config, state.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent)
    with atomic_file(path) as file:
        torch.save(contents(state, fingerprint), file)
    for old in _all(config)[: -config.output.keep]:
        old.unlink(missing_ok=True)
    return path


def contents(state: TrainState, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint holds; see the module's docstring."""
    config = state.config
    out: dict[str, Any] = {}
    if state.generator is not None and state.generator_ema is not None:
        out |= {"ar": _weights(state.generator), "ema": _weights(state.generator_ema)}
        if state.projectors is not None:
            out["projectors"] = _weights(state.projectors)
    if config.stage != "generator":
        assert state.discriminator is not None
        out |= {"vq": _weights(state.tokenizer), "vq_ema": _weights(state.tokenizer_ema)}
        out["discriminator"] = _weights(state.discriminator)
    for name, optimizer in state.optimizers.items():
        suffix = "" if config.stage == "generator" else f"_{name}"
        out |= {f"opt{suffix}": optimizer.adamw.state_dict(), f"sched{suffix}": optimizer.schedule.state_dict()}
    out |= {"args": official_args(state), "steps": state.step}
    if config.stage == "tokenizer":
        out["stage"] = 0
    if state.encoder is not None:
        out["encoder"] = {"settings": state.encoder.settings, "state": _weights(state.encoder)}
    out["resume"] = {"config": _plain(config.to_dict()), "data": fingerprint, "lecam": state.lecam}
    return out


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}


def _plain(value: Any) -> Any:
    """Tuples as lists: what a file gives back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def official_args(state: TrainState) -> dict[str, Any]:
    """The run's settings under the official trainers' argument names, for programs that read ``args``.

    ``vq_model`` and ``ar_model`` are given only where the architecture is a published one; ``n_head`` always is.
    """
    config, tokenizer = state.config, state.config.tokenizer
    args: dict[str, Any] = {
        "image_size": config.data.image_size,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "max_train_steps": config.steps,
        "codebook_size": tokenizer.codebook_size,
        "codebook_embed_dim": tokenizer.codebook_embed_dim,
        "downsample_ratio": tokenizer.downsample,
        "mixed_precision": "bf16" if config.precision == "bf16" else "no",
    }
    if tokenizer.family == "vq":
        args["codebook_l2_norm"] = tokenizer.codebook_l2_norm
    if tokenizer.family == "lfq":
        args["entropy_num_groups"] = tokenizer.num_codebooks
    for name, preset in TOKENIZER_PRESETS.items():
        if preset == tokenizer:
            args["vq_model"] = name
    if state.generator is not None:
        generator = state.generator.config
        args |= {"num_classes": generator.num_classes, "cls_token_num": 1, "n_head": generator.n_head}
        sizes = (generator.dim, generator.n_layer, generator.n_head, generator.ffn_dim)
        for name, size in GENERATOR_PRESETS.items():
            if name.startswith("LlamaGen-") and (size.dim, size.n_layer, size.n_head, size.ffn_dim) == sizes:
                args["ar_model"] = name
    if config.stage == "generator":
        args |= {"vq_ckpt": os.path.abspath(config.init.tokenizer), "vq_use_ema": config.init.use_ema}
    return args


def restore(state: TrainState, path: Path, fingerprint: str) -> None:
    """Puts a checkpoint of the same run into ``state``: weights, averages, optimizers, schedules and the step.

    Raises:
        CheckpointError: unreadable, or not a training checkpoint of ours.
        ResumeMismatchError: of a run with other settings or other images; the message names the first difference.
    """
    stored = read_file(path)
    resume = stored.get("resume")
    if not isinstance(resume, dict) or "steps" not in stored:
        raise CheckpointError(f"{path} has no resume entry: it was not written by this trainer")
    _check_settings(state.config, resume, path, fingerprint)
    modules = {
        "ar": state.generator,
        "ema": state.generator_ema,
        "projectors": state.projectors,
        "vq": state.tokenizer if state.config.stage != "generator" else None,
        "vq_ema": state.tokenizer_ema if state.config.stage != "generator" else None,
        "discriminator": state.discriminator,
    }
    try:
        for name, module in modules.items():
            if module is not None:
                module.load_state_dict(stored[name], strict=True)
        for name, optimizer in state.optimizers.items():
            suffix = "" if state.config.stage == "generator" else f"_{name}"
            optimizer.adamw.load_state_dict(stored[f"opt{suffix}"])
            optimizer.schedule.load_state_dict(stored[f"sched{suffix}"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold this run's models: {error}") from error
    state.lecam = resume["lecam"].to(state.lecam)
    state.step = int(stored["steps"])


def _check_settings(config: TrainConfig, resume: dict[str, Any], path: Path, fingerprint: str) -> None:
    difference = first_difference(_binding(resume["config"]), _binding(_plain(config.to_dict())))
    if difference is not None:
        name, old, new = difference
        raise ResumeMismatchError(
            f"{path} was trained with {name} = {old!r}, this run asks for {new!r}; choose another output.folder"
        )
    if resume["data"] != fingerprint:
        raise ResumeMismatchError(f"{path} was trained on other images (number, names or order differ)")


def _binding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's numbers."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _FREE:
            continue
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if f"{name}.{key}" not in _FREE}
        out[name] = value
    return out
