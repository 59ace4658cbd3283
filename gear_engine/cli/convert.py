"""``gear-engine convert IN OUT``: any published checkpoint to a folder of config.json and safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

_GENERATOR = {
    "ar_model": (str, "official name, such as LlamaGen-B"),
    "image_size": (int, "edge of the images in pixels (256 where the checkpoint does not say)"),
    "n_head": (int, "attention heads, for widths that are not published"),
    "num_classes": (int, "labels without the unconditional one"),
    "cls_token_num": (int, "prefix length of a text model"),
    "text_attn": (str, "causal or prefix"),
}
_TOKENIZER = {
    "vq_model": (str, "official name, such as VQ-16"),
    "codebook_embed_dim": (int, "width of a code"),
    "num_codebooks": (int, "indices per position (GLFQ)"),
}
_BOTH = {
    "codebook_size": (int, "vocabulary and number of codes"),
    "downsample_ratio": (int, "pixels per token along an edge"),
}


def add_parser(subparsers: Any) -> None:
    """Adds ``convert`` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint to a folder with config.json and safetensors",
        description="Reads a checkpoint of any published format, in a process that cannot reach the network, and "
        "writes a folder that Pipeline.from_pretrained opens. The written weights are compared with those read.",
    )
    parser.add_argument("input", metavar="IN", help="checkpoint file, or org/name@revision:file on the hub")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--tokenizer", metavar="FILE", help="the tokenizer, where IN does not lead to it")
    parser.add_argument("--generator-only", action="store_true", help="leave the tokenizer out")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="EMA weights where there are any (default)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the model in OUT")
    model = parser.add_argument_group("architecture (default: from the checkpoint)")
    for name, (kind, text) in (_GENERATOR | _TOKENIZER | _BOTH).items():
        model.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def run(args: argparse.Namespace) -> int:
    """Converts and says what was taken."""
    from gear_engine.checkpoint.conversion import convert

    def given(names: Any) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    done = convert(
        args.input,
        args.output,
        tokenizer=args.tokenizer,
        ema=args.ema,
        generator_only=args.generator_only,
        force=args.force,
        generator_overrides=given(_GENERATOR | _BOTH),
        tokenizer_overrides=given(_TOKENIZER | _BOTH),
    )
    for part, line in (("generator", done.generator), ("tokenizer", done.tokenizer)):
        if line is not None:
            print(f"{part}: {line}")
    where = "in a network namespace without interfaces" if done.network == "none" else "with sockets refused"
    print(f"{done.tensors} tensors written to {done.folder} and read back bit-equal ({where})")
    return 0
