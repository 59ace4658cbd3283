"""Ours against the official code in a checkout: tokens, pixels, time, peak memory.

    python -m gear_engine.bench.compare_official --official PATH [--task class|text|tokenizers] [--size B] [--json OUT]

``class``: a checkpoint in the official stage-1 format (random weights; the head too, which the official initialisation
leaves at zero) with VQ-16, sampled by ``gear-engine sample --rng torch`` and by the official code. ``text``: a
text-to-image generator of 1B width at few layers. ``tokenizers``: every published tokenizer at 256 px. Each side runs
in a process of its own, both seed after building; times are wall clock and processor time, memory is the process's
peak resident size.

Equal means: floats max|a - b| / max|b| <= 1e-5, soft read-outs 1e-4; decoded images likewise, or within 1e-5 of the
official code in float64 and no farther from it than the official code in fp32 is; tokens equal, where a first
difference counts as a tie only if the official scores log p - log q of the two tokens lie within 1e-4 (times cfg / 4
above 4); pixels within 1 of 255.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gear_engine.bench.comparison import (
    FLOAT_TOLERANCE,
    READOUT_TOLERANCE,
    compare_tokens,
    decoder_agrees,
    relative_error,
    report,
    run_child,
    run_driver,
    side,
    tokenizer_errors,
    whole,
)
from gear_engine.config import GENERATOR_PRESETS, TOKENIZER_PRESETS, GeneratorConfig
from gear_engine.models.transformer import Transformer
from gear_engine.tokenizers import build_tokenizer


def random_generator(config: GeneratorConfig, seed: int) -> dict[str, torch.Tensor]:
    """A state dict: the official initialisation, but for a head with logits of about unit variance."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        model.output.weight.normal_(std=config.dim**-0.5)
    return model.state_dict()


def write_stage1(path: Path, size: str) -> GeneratorConfig:
    """A GEAR stage-1 file: live and EMA weights of both models, and the training arguments."""
    config = GENERATOR_PRESETS[f"LlamaGen-{size}"]
    torch.manual_seed(100)
    live, ema = (build_tokenizer(TOKENIZER_PRESETS["VQ-16"]).state_dict() for _ in range(2))
    args = {
        "ar_model": f"LlamaGen-{size}",
        "vq_model": "VQ-16",
        "image_size": 256,
        "downsample_ratio": 16,
        "codebook_size": 16384,
        "codebook_embed_dim": 8,
        "num_classes": 1000,
        "cls_token_num": 1,
    }
    content = {"ar": random_generator(config, 1), "ema": random_generator(config, 2), "vq": live, "vq_ema": ema}
    torch.save({**content, "args": args, "steps": 400000}, path)
    return config


def model_fields(config: GeneratorConfig) -> dict[str, Any]:
    """The official ``ModelArgs`` of a configuration."""
    fields = {"dim": config.dim, "n_layer": config.n_layer, "n_head": config.n_head, "vocab_size": config.vocab_size}
    fields |= {
        "block_size": config.block_size,
        "num_classes": config.num_classes,
        "cls_token_num": config.cls_token_num,
    }
    if config.conditioning == "text":
        fields |= {"caption_dim": config.caption_dim, "text_attn": config.text_attn}
        fields |= {"n_double_stream_layers": config.n_double_stream_layers}
    return fields


def compare_class(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    checkpoint = folder / "exp" / "checkpoints" / "0400000.pt"
    checkpoint.parent.mkdir(parents=True)
    config = write_stage1(checkpoint, options.size)
    sampling = {"cfg_scale": options.cfg_scale, "temperature": 1.0, "top_k": options.top_k, "top_p": options.top_p}
    job = {
        "task": "class",
        "checkout": str(options.official),
        "checkpoint": str(checkpoint),
        "model": model_fields(config),
        "tokenizer": "VQ-16",
        "code_dim": 8,
        "sampling": sampling,
        "seed": options.seed,
        "count": options.count,
        "batch": options.batch,
        "threads": options.threads,
    }
    official, official_child = run_driver("official", job, folder, "class")
    ours, ours_child = run_driver("engine", job, folder, "class")
    flags = ["--rng", "torch", "--fid-num", options.count, "--per-proc-batch-size", options.batch]
    flags += ["--seed", options.seed, "--cfg-scale", options.cfg_scale, "--top-k", options.top_k]
    flags += ["--top-p", options.top_p, "--ckpt-path", checkpoint, "--output-dir", folder / "samples"]
    command = [sys.executable, "-m", "gear_engine.cli", "sample", *map(str, flags)]
    program = run_child(command, folder / "class.program.log")
    (packed,) = (folder / "samples").rglob("samples.npz")
    with np.load(packed) as stored:
        pixels = stored["arr_0"]
    tokens = compare_tokens(job, folder, official, ours)
    same = (official["tokens"] == ours["tokens"]).all(axis=1)[: options.count]
    worst = {
        name: int(np.abs(images[: options.count][same].astype(int) - official["pixels"][: options.count][same]).max())
        for name, images in (("engine", ours["pixels"]), ("program", pixels))
        if same.any()
    }
    ok = tokens["different"] == 0 and bool(same.any()) and max(worst.values()) <= 1
    return {
        "task": f"class, LlamaGen-{options.size}, VQ-16, {options.count} images by {options.batch}",
        "tokens": tokens,
        "largest_pixel_difference": worst,
        "official": side(official, official_child),
        "ours": side(ours, ours_child),
        "program": whole(program),
        "ok": ok,
    }


def compare_text(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    double = max(1, round(options.layers / 3))
    config = GENERATOR_PRESETS["GEAR-T2I-1B"].replace(
        n_layer=options.layers, n_double_stream_layers=double, text_attn=options.text_attn
    )
    checkpoint = folder / "text.pt"
    torch.save({"ema": random_generator(config, 3)}, checkpoint)
    length, count = config.cls_token_num, options.count
    torch.manual_seed(4)
    states = torch.randn(count, length, config.caption_dim)
    lengths = torch.randint(1, length + 1, (count, 1))
    empty = torch.randn(1, length, config.caption_dim).expand(count, -1, -1)
    captions = folder / "captions.npz"
    np.savez(
        captions,
        states=states.numpy(),
        mask=(torch.arange(length)[None] < lengths).long().numpy(),
        uncond_states=empty.numpy(),
        uncond_mask=np.zeros((count, length), dtype=np.int64),
    )
    job = {
        "task": "text",
        "checkout": str(options.official),
        "checkpoint": str(checkpoint),
        "model": model_fields(config),
        "tokenizer": None,
        "captions": str(captions),
        "sampling": {"cfg_scale": options.cfg_scale, "top_k": options.top_k, "top_p": options.top_p},
        "seed": options.seed,
        "count": count,
        "batch": options.batch,
        "threads": options.threads,
    }
    official, official_child = run_driver("official", job, folder, "text")
    ours, ours_child = run_driver("engine", job, folder, "text")
    tokens = compare_tokens(job, folder, official, ours)
    return {
        "task": f"text, 1B width, {options.layers} layers, {options.text_attn}, {count} images by {options.batch}",
        "tokens": tokens,
        "official": side(official, official_child),
        "ours": side(ours, ours_child),
        "ok": tokens["different"] == 0,
    }


def compare_tokenizer(options: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    images = folder / "images.npy"
    torch.manual_seed(5)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 3, 24, 24), size=256, mode="bicubic")
    np.save(images, smooth.clamp(-1, 1).numpy())
    job = {
        "task": "tokenizer",
        "checkout": str(options.official),
        "checkpoint": str(folder / f"{name}.pt"),
        "tokenizer": name,
        "images": str(images),
        "write_checkpoint": True,
        "seed": options.seed,
        "threads": options.threads,
    }
    official, official_child = run_driver("official", job, folder, name)
    ours, ours_child = run_driver("engine", {**job, "official": str(folder / f"{name}.official.npz")}, folder, name)
    exact, _ = run_driver(
        "official", {**job, "exact_of": str(folder / f"{name}.official.npz")}, folder, f"{name}_exact"
    )
    errors = tokenizer_errors(official, ours)
    from_float64 = {
        key: relative_error(arrays["decoded"], exact["decoded"])
        for key, arrays in (("ours", ours), ("official", official))
    }
    limits = {"quant": FLOAT_TOLERANCE, "distance_rows": FLOAT_TOLERANCE, "soft_readout": READOUT_TOLERANCE}
    within = all(errors[key] <= limit for key, limit in limits.items())
    within = within and decoder_agrees(errors["decoded"], from_float64)
    other = (ours["indices"].reshape(-1) != official["indices"].reshape(-1)).sum()
    gap = float(ours["index_gap"].max())
    return {
        "task": f"tokenizer {name}, 256 px",
        "indices": {"count": int(official["indices"].size), "other": int(other), "largest_gap": gap},
        "errors": errors,
        "decoded_from_float64": from_float64,
        "official": side(official, official_child),
        "ours": side(ours, ours_child),
        "ok": within and gap <= FLOAT_TOLERANCE,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, required=True, help="checkout of Tencent-Hunyuan/GEAR (needs einops)")
    parser.add_argument("--task", choices=["class", "text", "tokenizers", "all"], default="class")
    parser.add_argument("--size", default="B", help="LlamaGen size of the class task (%(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="layers of the text task (%(default)s)")
    parser.add_argument("--text-attn", choices=["causal", "prefix"], default="causal")
    parser.add_argument("--tokenizer", nargs="*", default=list(TOKENIZER_PRESETS), help="tokenizers to compare (all)")
    parser.add_argument("--count", type=int, default=4, help="images (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (%(default)s)")
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads of both sides (torch's default)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.official = options.official.resolve()
    if not (options.official / "models" / "generate.py").is_file():
        parser.error(f"{options.official} is no checkout of GEAR: it has no models/generate.py")
    results = []
    with tempfile.TemporaryDirectory(prefix="compare_official_") as name:
        folder = Path(name)
        if options.task in ("class", "all"):
            results.append(compare_class(options, folder))
        if options.task in ("text", "all"):
            results.append(compare_text(options, folder))
        if options.task in ("tokenizers", "all"):
            results += [compare_tokenizer(options, folder, each) for each in options.tokenizer]
    print(report(results))
    if options.json is not None:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        content = {"machine": machine, "torch": torch.__version__, "command": sys.argv, "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
