"""Times the CPU decoder against the official one, and shows its error first.

``python -m gear_engine.bench.decoder [--official PATH] [--tokenizer VQ-16] [--images 1 8] [--compile] [--json FILE]``

Weights follow a seeded rule that gives images of natural amplitude; codes are random. PSNR is of pixels clamped to
[-1, 1] against the official decoder in fp32 (ours without a checkout), the smallest over the images. ``of_rate_%`` is
the rate of the network's products, as direct convolutions count them, over the machine's multiply rate in the peer's
dtype, measured in the same run; Winograd needs fewer and may pass 100%. A CPU without bf16
convolutions runs the official decoder in bf16 six times as slowly as in fp32: there it is left out, and a line says so.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gear_engine.bench import counts, timing
from gear_engine.config import TOKENIZER_PRESETS
from gear_engine.metrics import psnr
from gear_engine.tokenizers import Decoder, Tokenizer, build_tokenizer, decoder_fast

MODULES = {"VQ": ("vq_model", "VQ_models"), "IBQ": ("ibq_model", "IBQ_models"), "LFQ-16": ("lfq_model", "LFQ_models")}
GLFQ = ("glfq_model", "GLFQ_models")


def fill(tokenizer: Tokenizer) -> None:
    """Weights of variance 1 / fan-in, norms about 1, codes of unit variance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim == 1:
                parameter.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)
            elif "embedding" not in name:
                parameter.div_(math.sqrt(parameter[0].numel()))


def official_tokenizer(checkout: Path, name: str, ours: Tokenizer) -> Any:
    """The checkout's own tokenizer with the weights of ``ours``."""
    if not (checkout / "models" / "vq_model.py").is_file():
        sys.exit(f"{checkout} has no models/vq_model.py: --official wants a checkout of the official GEAR code")
    module, registry = MODULES.get(name) or MODULES.get(name.split("-")[0]) or GLFQ
    sys.path.insert(0, str(checkout))
    try:
        models = getattr(importlib.import_module(f"models.{module}"), registry)
    finally:
        sys.path.remove(str(checkout))
    official = models[name]()
    official.load_state_dict(ours.state_dict(), strict=True)
    return official.eval().requires_grad_(False)


def peers(
    tokenizer: Tokenizer, official: Any, codes: torch.Tensor, shape: tuple[int, ...], *, compiled: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """name -> decoder of ``codes``; the first one is the baseline."""
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    if official is not None:
        calls["official fp32"] = lambda: official.decode_code(codes, shape)
        reason = decoder_fast.unavailable(torch.bfloat16)
        half = official_tokenizer_like(official, tokenizer).bfloat16().to(memory_format=torch.channels_last)
        if reason is None:
            calls["official bf16 channels_last"] = lambda: half.decode_code(codes, shape)
        else:
            print(f"official bf16 left out: {reason}")
        if compiled:
            calls["official bf16 compiled"] = torch.compile(lambda: half.decode_code(codes, shape))
    exact = Decoder(tokenizer)
    calls["modules fp32"] = lambda: tokenizer.decode(tokenizer.lookup(codes, shape))
    calls["decode_code fp32"] = lambda: tokenizer.decode_code(codes, shape)
    calls["Decoder fp32"] = lambda: exact.decode_code(codes, shape)
    if decoder_fast.unavailable(torch.bfloat16) is None:
        bf16 = Decoder(tokenizer, dtype=torch.bfloat16)
        calls["Decoder bf16"] = lambda: bf16.decode_code(codes, shape)
    return calls


def official_tokenizer_like(official: Any, tokenizer: Tokenizer) -> Any:
    """A second official tokenizer with the same weights."""
    config = official.config
    second = type(official)(config)
    second.load_state_dict(tokenizer.state_dict(), strict=True)
    return second.eval().requires_grad_(False)


def measure(
    name: str, images: int, pixels: int, options: argparse.Namespace, ceilings: timing.Ceilings
) -> list[dict[str, Any]]:
    """One row per peer: error against the baseline, time, and the rate of the official network's products."""
    tokenizer = build_tokenizer(TOKENIZER_PRESETS[name]).requires_grad_(False)
    fill(tokenizer)
    shape = tokenizer.latent_shape(images, pixels, pixels)
    count = images * shape[2] * shape[3] * tokenizer.config.num_codebooks
    codes = torch.randint(0, tokenizer.quantize.num_codes, (count,), generator=torch.Generator().manual_seed(1))
    official = None if options.official is None else official_tokenizer(options.official, name, tokenizer)
    calls = peers(tokenizer, official, codes, shape, compiled=options.compile)
    baseline = next(iter(calls))
    flops = counts.decoder(tokenizer.config, images, pixels, pixels).ops
    with torch.inference_mode():
        expected = calls[baseline]().float().clamp(-1, 1).add(1).div(2)
        errors = {}
        for peer, call in calls.items():
            got = call().float().clamp(-1, 1).add(1).div(2)
            errors[peer] = (float(psnr(got, expected).min()), float((got - expected).abs().max() * 2))
        # The calls above were the warm-up.
        samples = timing.alternate(calls, warmup=0, repeats=options.repeats, budget=options.budget)
    rows = []
    first = timing.statistics(samples[baseline])["median_ms"]
    for peer, times in samples.items():
        row = timing.statistics(times)
        rate = flops / (row["median_ms"] / 1e3)
        limit = ceilings.rate("bfloat16" if "bf16" in peer else "float32")
        rows.append(
            {
                "tokenizer": name, "pixels": pixels, "images": images, "what": peer, **row,
                f"x {baseline}": first / row["median_ms"], "GFLOP/s": rate / 1e9, "of_rate_%": 100 * rate / limit,
                "psnr_dB": errors[peer][0], "max_abs": errors[peer][1],
            }
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.decoder", description=__doc__)
    parser.add_argument("--official", type=Path, help="checkout of the official GEAR code, timed as shipped")
    parser.add_argument("--tokenizer", nargs="+", default=["VQ-16"], choices=sorted(TOKENIZER_PRESETS))
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--pixels", type=int, default=256, help="edge of the images")
    parser.add_argument("--compile", action="store_true", help="also the official decoder in bf16 under torch.compile")
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds per case after which no round begins")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    ceilings = timing.measure_ceilings(dtypes=("float32", "bfloat16"))
    print(ceilings, flush=True)
    rows: list[dict[str, Any]] = []
    for name in options.tokenizer:
        for images in options.images:
            found = measure(name, images, options.pixels, options, ceilings)
            print("\n" + timing.render(found), flush=True)
            rows += found
    if options.json:
        timing.write_json(options.json, {**timing.provenance(), "ceilings": ceilings.record(), "rows": rows})


if __name__ == "__main__":
    main()
