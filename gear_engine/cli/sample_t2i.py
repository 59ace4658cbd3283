"""``gear-engine sample-t2i``: sampling from captions with the flags and the layout of ``src/inference_t2i.py``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gear_engine.cli import options
from gear_engine.cli.environment import DTYPE_NAMES
from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.runs.world import detect_world

if TYPE_CHECKING:
    from gear_engine.cli.captions import TextFeatures
    from gear_engine.cli.loading import Models
    from gear_engine.cli.sampling import Plan

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Adds ``sample-t2i`` to the command line."""
    parser = subparsers.add_parser(
        "sample-t2i",
        help="sample images of captions from a checkpoint",
        description="Samples a text-to-image checkpoint, one image per prompt, into "
        "OUTPUT_DIR/EXPERIMENT/STEP/SAMPLING/: samples/%%06d.png, samples.npz and run.json.",
    )
    options.add_checkpoint_flags(parser)
    parser.add_argument("--text-attn", choices=["causal", "prefix"], help="attention inside the text prefix")
    captions = parser.add_argument_group("captions")
    captions.add_argument("--prompts-jsonl", type=Path, help='one {"caption": ...} per line')
    captions.add_argument("--features", type=Path, help="safetensors file of encoder states, in place of prompts")
    captions.add_argument("--num", type=int, default=0, help="only the first N captions; 0: all (%(default)s)")
    captions.add_argument("--text-encoder", default="", help="folder or hub name (default: the checkpoint's)")
    captions.add_argument("--text-max-len", type=int, default=0, help="tokens per caption (default: the model's)")
    captions.add_argument(
        "--text-dtype", choices=DTYPE_NAMES, help="of the encoder (default: the training's mixed precision, or bf16)"
    )
    captions.add_argument(
        "--encode-batch", type=int, metavar="N", help="captions encoded at once (default: 1; --rng torch: all)"
    )
    options.add_sampling_flags(parser)
    options.add_engine_flags(parser)
    options.add_output_flags(parser, image_size_eval=None)


def run(args: argparse.Namespace) -> int:
    """Samples; the exit status."""
    from gear_engine.cli.captions import FeatureFile, TextSource, read_prompts
    from gear_engine.cli.loading import load_models
    from gear_engine.cli.sampling import build_engine, make_plan, sample_all

    world = detect_world()
    plan = make_plan(args, world)
    _check(args)
    features: TextFeatures | None = FeatureFile(args.features, args.num) if args.features else None
    prompts = read_prompts(args.prompts_jsonl, args.num) if features is None else []
    world.join()
    try:
        models = load_models(plan)
        if models.generator.config.conditioning != "text":
            raise ConfigError(f"{args.ckpt_path} is a class-conditional model: use gear-engine sample")
        engine = build_engine(plan, models)
        if features is None:
            features = _encode(plan, models, prompts)
        guided = any(params.uses_guidance for params in plan.scales)
        source = TextSource(features, models.generator.config, plan.device, guided)
        return sample_all(plan, models, engine, source)
    finally:
        world.leave()


def _check(args: argparse.Namespace) -> None:
    if (args.prompts_jsonl is None) == (args.features is None):
        raise InvalidRequestError("give --prompts-jsonl FILE, or --features FILE with precomputed states")
    if args.features is not None:
        unused = [
            name for name in ("text_encoder", "text_max_len", "text_dtype", "encode_batch") if getattr(args, name)
        ]
        if unused:
            raise InvalidRequestError(f"--{unused[0].replace('_', '-')} has no meaning with --features: drop it")
    if args.num < 0 or args.text_max_len < 0 or (args.encode_batch is not None and args.encode_batch < 1):
        raise InvalidRequestError("--num, --text-max-len and --encode-batch must not be negative")


def _encode(plan: Plan, models: Models, prompts: list[str]) -> TextFeatures:
    """The prompts behind the checkpoint's text encoder, or the one that ``--text-encoder`` names."""
    from gear_engine.cli.captions import EncodedPrompts
    from gear_engine.cli.environment import dtype_of
    from gear_engine.cli.loading import text_encoder_choice
    from gear_engine.text_encoders import load_text_encoder

    args, config = plan.args, models.generator.config
    name, dtype = text_encoder_choice(args, config)
    if not name:
        raise ConfigError("the checkpoint does not name its text encoder: pass --text-encoder, or --features")
    length = args.text_max_len or config.cls_token_num
    if length != config.cls_token_num:
        raise ConfigError(f"--text-max-len {length} differs from the model's prefix of {config.cls_token_num} tokens")
    encoder = load_text_encoder(name, max_length=length, device=plan.device, dtype=dtype_of(dtype))
    if config.learned_uncond != (encoder.kind == "t5"):
        wanted = "LlamaGen's and takes T5 states" if config.learned_uncond else "GEAR's and takes Qwen states"
        raise ConfigError(f"{name} is a {encoder.kind} encoder, but the model is {wanted}: pass another --text-encoder")
    if encoder.hidden_size != config.caption_dim:
        raise ConfigError(f"{name} has states of width {encoder.hidden_size}, the model takes {config.caption_dim}")
    return EncodedPrompts(prompts, encoder, name, args.encode_batch or (plan.batch if args.rng == "torch" else 1))
