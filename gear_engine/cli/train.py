"""``gear-engine train``: one stage of the training recipe, from a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from gear_engine.errors import InvalidRequestError
from gear_engine.runs.world import detect_world

__all__ = ["add_parser", "run"]

_SHOWN = ("vq_total", "ar_total", "ce_loss", "proj_loss_vq", "codebook_usage")


def add_parser(subparsers: Any) -> None:
    """Adds ``train`` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train a tokenizer, a generator, or both jointly",
        description="Trains one stage into the configuration's output.folder: checkpoints/%%07d.pt in the official "
        "formats, log.jsonl, samples/. A killed run goes on with --resume, to the same losses. Start with torchrun or "
        "accelerate launch to use several processes. docs/training.md describes the file.",
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--steps", type=int, help="steps of the whole run (default: the file's)")
    parser.add_argument("--output-dir", help="folder of the run (default: the file's output.folder)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: an accelerator if there is one)")


def run(args: argparse.Namespace) -> int:
    """Trains; the exit status."""
    if args.steps is not None and args.steps < 1:
        raise InvalidRequestError(f"--steps must be at least 1, got {args.steps}")
    from tqdm import tqdm

    from gear_engine.cli.environment import pick_device
    from gear_engine.training import Trainer, load_config

    config = load_config(args.config)
    if args.steps is not None:
        config = config.replace(steps=args.steps)
    if args.output_dir is not None:
        config = config.replace(output=dataclasses.replace(config.output, folder=args.output_dir))
    world = detect_world()
    device = pick_device(args.device, world)
    world.join()
    try:
        trainer = Trainer(
            config,
            resume=args.resume,
            world=world,
            device=device,
            report=lambda record: tqdm.write(_line(record)) if "encoder_step" in record else None,
        )
        label = f"{config.stage} stage"
        with tqdm(total=config.steps, initial=trainer.step, desc=label, disable=not world.is_main) as bar:
            for record in trainer.run():
                bar.update(1)
                if record is not None:
                    bar.set_postfix({name: f"{record[name]:.4g}" for name in _SHOWN if name in record})
    finally:
        world.leave()
    if world.is_main:
        print(f"step {trainer.step}: checkpoints, log.jsonl and samples are in {config.folder}")
    return 0


def _line(record: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in record.items())
