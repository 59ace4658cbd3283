"""Flags that ``sample`` and ``sample-t2i`` share: those of GEAR's sampling programs, and ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from gear_engine.cli.environment import DTYPE_NAMES

__all__ = ["add_checkpoint_flags", "add_engine_flags", "add_output_flags", "add_sampling_flags"]

_ON_OFF = argparse.BooleanOptionalAction


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Files, EMA choice, and what overrides a checkpoint's own ``args``."""
    files = parser.add_argument_group("checkpoint")
    files.add_argument("--ckpt-path", type=Path, required=True, help="checkpoint file, or a converted folder")
    files.add_argument("--vq-ckpt-path", type=Path, help="tokenizer file, where the checkpoint does not lead to one")
    files.add_argument("--use-ar-ema", default=True, action=_ON_OFF, help="the generator's EMA weights")
    files.add_argument("--use-vq-ema", default=True, action=_ON_OFF, help="the tokenizer's EMA weights")
    model = parser.add_argument_group("architecture (default: from the checkpoint)")
    model.add_argument("--ar-model", help="generator by name, such as LlamaGen-B")
    model.add_argument("--n-head", type=int, help="attention heads, for widths that are not published")
    model.add_argument("--image-size", type=int, help="pixels along an edge that the generator was trained at")
    model.add_argument("--vq-model", help="tokenizer by name, such as VQ-16")
    model.add_argument("--codebook-size", type=int, help="number of codes")
    model.add_argument("--codebook-embed-dim", type=int, help="width of a code")
    model.add_argument("--downsample-ratio", type=int, help="pixels per token along an edge")
    model.add_argument("--cls-token-num", type=int, help="length of the prefix")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--per-proc-batch-size", type=int, default=32, metavar="N", help="images at a time (%(default)s)"
    )
    group.add_argument(
        "--cfg-scale", type=float, nargs="+", default=[1.0], metavar="S", help="guidance scales, one run each (1.0)"
    )
    group.add_argument("--cfg-interval", type=float, default=-1, help="last step with guidance; -1: all (%(default)s)")
    group.add_argument("--temperature", type=float, default=1.0, help="(%(default)s)")
    group.add_argument("--top-k", type=int, default=0, help="0 keeps every token (%(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="1 keeps every token (%(default)s)")
    group.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    group.add_argument(
        "--rng",
        choices=["philox", "torch"],
        default="philox",
        help="philox: an image depends on its number and the seed alone; torch: the official draws (%(default)s)",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Where and with which arithmetic."""
    group = parser.add_argument_group("engine")
    group.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32", help="of the generator (%(default)s)")
    group.add_argument(
        "--weight-format",
        choices=["bf16", "int8"],
        help="packs the generator's linear weights: fewer bytes per step, other tokens (default: as --dtype says)",
    )
    group.add_argument(
        "--cache-dtype",
        choices=["fp8"],
        help="of keys and values: half of bf16's memory, other tokens (default: as --dtype says)",
    )
    group.add_argument(
        "--decode-dtype",
        choices=DTYPE_NAMES,
        default="fp32",
        help="of the decoder; bf16: of its convolutions' operands; fp16: CUDA only (%(default)s)",
    )
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: this process's accelerator, or the CPU)")
    group.add_argument("--backend", default="auto", help="NAME, or OP=NAME,...; see gear-engine info (%(default)s)")
    group.add_argument("--tf32", default=True, action=_ON_OFF, help="TF32 products on CUDA, as officially")
    group.add_argument(
        "--decode-batch",
        type=int,
        metavar="N",
        help="images decoded at once (default: 1, so that pixels depend on no neighbour; --rng torch on CUDA: all)",
    )


def add_output_flags(parser: argparse.ArgumentParser, image_size_eval: int | None) -> None:
    """What is written, and where."""
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, required=True, help="writes OUTPUT_DIR/EXPERIMENT/STEP/SAMPLING/")
    group.add_argument("--exp-name", default="", help="EXPERIMENT (default: the folder above checkpoints/)")
    group.add_argument("--tag", default="", help="appended to SAMPLING")
    group.add_argument(
        "--image-size-eval",
        type=int,
        default=image_size_eval,
        help=f"images are resized to this edge ({image_size_eval or 'as generated'})",
    )
    group.add_argument("--keep-pngs", default=True, action=_ON_OFF, help="keep the PNG files beside samples.npz")
    group.add_argument("--pack-npz", default=True, action=_ON_OFF, help="write samples.npz")
