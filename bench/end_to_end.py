"""The whole job against the official code: labels in, 8-bit images out, in one process, in turn.

    python -m gear_engine.bench.end_to_end --official PATH [--model LlamaGen-B] [--tokenizer VQ-16] [--images 1 8]
        [--rounds 3] [--tokens 256] [--compiled] [--json OUT]

Every round runs each contestant once: the official ``generate`` and ``decode_code`` as shipped (fp32) and moved to bf16
(with ``--compiled`` also compiled, both models), and gear_engine: fp32 weights and an fp32 :class:`Decoder`, bf16 and
int8 weights with a bf16 one (fp32 where the machine has no bf16 convolutions; column ``decoder``). Weights are random
and the same on every side, ``rng="torch"``. Images are made bytes on both sides. With fewer ``--tokens`` than a grid
has, zeros fill it up. Compiling, :meth:`Engine.warm_up` and one decoding each come before the first round and are
reported as ``prepare_s``.

A CPU without bf16 convolutions decodes with the official code in bf16 six times as slowly as in fp32: there that
contestant is left out, and a line says so.

``of_floor_%`` divides the least time that the machine's limits allow, measured in the same run, by our fastest round:
per step the larger of its bytes over the read bandwidth and its products over the multiply rate, and the decoder's
products over that of its dtype (as direct convolutions count them; Winograd needs fewer).

``x official`` divides the medians of the two, ``x best`` the fastest rounds, ``x processor`` the least processor times.
Checks: images whose fp32 tokens equal the official ones and the largest difference of their bytes; the decoders' PSNR
on the official tokens, the least over the images, against the official decoder. Peak memory of ours is taken in
processes of its own (see peak_memory).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gear_engine import Engine, SamplingParams
from gear_engine.bench import counts, peak_memory, timing
from gear_engine.bench.decoder import fill
from gear_engine.bench.inputs import generator_config, generator_weights, official_tokenizer
from gear_engine.bench.registry import Context, Skip
from gear_engine.bench.rollout import official_rollout
from gear_engine.bench.step_costs import CFG_SCALE, RATE_DTYPES, step_bytes, step_ops
from gear_engine.config import TOKENIZER_PRESETS, GeneratorConfig, TokenizerConfig
from gear_engine.metrics import psnr
from gear_engine.models.weights import GeneratorWeights
from gear_engine.tokenizers import Decoder, Tokenizer, build_tokenizer, decoder_fast, to_uint8

#: Codes (B, block_size) -> images [B, 3, H, W], about [-1, 1].
Decode = Callable[[torch.Tensor], torch.Tensor]
#: PSNR of the images that count as equal to the official ones, in dB.
PSNR_BOUND = 45.0


@dataclass
class Contestant:
    """Tokens, then images; ``to_bytes`` maps [B, 3, H, W] to uint8 [B, H, W, 3]."""

    draw: Callable[[], torch.Tensor]
    decode: Decode
    to_bytes: Callable[[torch.Tensor], torch.Tensor]
    #: Seconds that the machine's limits allow at best; None: not counted.
    floor: Callable[[timing.Ceilings], float] | None = None
    #: Before the first round.
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Result:
    """Seconds of every round, and what the last one made."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    tokens_s: list[float] = field(default_factory=list)
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    images: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def _whole_grid(tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """int64 (B, block_size): the tokens, zeros behind them."""
    whole = torch.zeros(len(tokens), block_size, dtype=torch.int64)
    whole[:, : tokens.shape[1]] = tokens
    return whole


def _official_bytes(images: torch.Tensor) -> torch.Tensor:
    """What the official sampling program does with the decoder's output."""
    return torch.clamp(127.5 * images + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def contestants(
    weights: GeneratorWeights, tokenizer: Tokenizer, labels: list[int], tokens: int, checkout: Path | None,
    *, compiled: bool = False,
) -> dict[str, Contestant]:  # fmt: skip
    """name -> contestant; "official" is the baseline where there is a checkout."""
    pixels = weights.config.grid_size * tokenizer.config.downsample
    shape = tokenizer.latent_shape(len(labels), pixels, pixels)
    found: dict[str, Contestant] = {}
    if checkout is not None:
        names = {"official": torch.float32}
        reason = decoder_fast.unavailable(torch.bfloat16)
        if reason is None:
            names["official bf16"] = torch.bfloat16
        else:
            print(f"official bf16 left out: {reason}")
        if compiled:
            names["official bf16 compiled"] = torch.bfloat16
        for name, dtype in names.items():
            compiles = name.endswith("compiled")
            draw = official_rollout(weights.to(dtype=dtype), labels, tokens, checkout, compiled=compiles)
            model = _official_decoder(checkout, tokenizer).to(dtype)
            decode = torch.compile(model.decode_code) if compiles else model.decode_code
            found[name] = Contestant(
                draw,
                lambda codes, decode=decode: decode(codes, shape),  # type: ignore[misc]
                _official_bytes,
                prepare=draw if compiles else lambda: None,
            )
    params = SamplingParams(cfg_scale=CFG_SCALE)
    dtypes = {peak_memory.decode_dtype(name) for name in peak_memory.FORMATS}
    decoders = {dtype: Decoder(tokenizer, dtype=dtype) for dtype in dtypes}
    for name, (dtype, kind) in peak_memory.FORMATS.items():
        engine = Engine(weights, max_images=len(labels), dtype=dtype, weight_format=kind, max_new_tokens=tokens)
        decoder = decoders[peak_memory.decode_dtype(name)]
        found[f"gear_engine {name}"] = Contestant(
            lambda engine=engine: engine.generate(labels, params, rng="torch", max_new_tokens=tokens),  # type: ignore[misc]
            lambda codes, decoder=decoder: decoder.decode_code(codes, shape),  # type: ignore[misc]
            to_uint8,
            partial(_floor, engine, tokenizer.config, name, len(labels), tokens),
            partial(engine.warm_up, "torch"),
        )
    return found


def _floor(
    engine: Engine, tokenizer: TokenizerConfig, name: str, images: int, tokens: int, ceilings: timing.Ceilings
) -> float:
    """Seconds of the steps and the decoder of format ``name``, if nothing but bandwidth and multiply rate took time."""
    moved = step_bytes(engine, images, tokens) / ceilings.read_bandwidth
    multiplied = step_ops(engine.config, images, tokens) / ceilings.rate(RATE_DTYPES[name])
    pixels = engine.config.grid_size * tokenizer.downsample
    decoder_rate = ceilings.rate(str(peak_memory.decode_dtype(name)).removeprefix("torch."))
    return tokens * max(moved, multiplied) + counts.decoder(tokenizer, images, pixels, pixels).ops / decoder_rate


def _official_decoder(checkout: Path, tokenizer: Tokenizer) -> Any:
    name = next(name for name, config in TOKENIZER_PRESETS.items() if config == tokenizer.config)
    try:
        return official_tokenizer(Context(torch.device("cpu"), official=checkout), name, tokenizer)
    except Skip as reason:
        sys.exit(str(reason))


@torch.no_grad()
def measure(calls: dict[str, Contestant], block_size: int, rounds: int, seed: int) -> dict[str, Result]:
    """Every contestant once per round, from the same seed."""
    results = {name: Result() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            result = results[name]
            torch.manual_seed(seed)
            start, processor = time.perf_counter(), time.process_time()
            result.tokens = call.draw()
            drawn = time.perf_counter()
            result.images = call.to_bytes(call.decode(_whole_grid(result.tokens, block_size)))
            result.processor.append(time.process_time() - processor)
            result.wall.append(time.perf_counter() - start)
            result.tokens_s.append(drawn - start)
    return results


@torch.no_grad()
def warm_up(calls: dict[str, Contestant], block_size: int, images: int) -> dict[str, float]:
    """Prepares every contestant and decodes once; name -> seconds."""
    codes = torch.zeros(images, block_size, dtype=torch.int64)
    return {
        name: timing.seconds(call.prepare) + timing.seconds(partial(call.decode, codes)) for name, call in calls.items()
    }


@torch.no_grad()
def check(calls: dict[str, Contestant], results: dict[str, Result], block_size: int) -> dict[str, Any]:
    """Agreement with the official code; without it, of bf16 with our fp32 decoder."""
    baseline = "official" if "official" in results else "gear_engine fp32"
    first, ours = results[baseline], results["gear_engine fp32"]
    equal = (first.tokens == ours.tokens).all(1)
    codes = _whole_grid(first.tokens, block_size)

    def unit(images: torch.Tensor) -> torch.Tensor:
        return images.float().clamp(-1, 1).add(1).div(2)

    expected = unit(calls[baseline].decode(codes))
    least = {}
    for name in ("gear_engine fp32", "gear_engine bf16"):
        value = float(psnr(unit(calls[name].decode(codes)), expected).min())
        least[name] = value if math.isfinite(value) else None
    bytes_ = (first.images[equal].int() - ours.images[equal].int()).abs()
    return {
        "images": len(equal),
        "baseline": baseline,
        "equal_images": int(equal.sum()),
        "largest_byte_difference": int(bytes_.max()) if bytes_.numel() else None,
        "psnr_dB": least,
        "ok": int(bytes_.max() if bytes_.numel() else 0) <= 1
        and all(value is None or value >= PSNR_BOUND for value in least.values()),
    }


def rows_of(results: dict[str, Result], images: int) -> list[dict[str, Any]]:
    """The table of one number of images, in seconds for all of them."""
    baseline = results.get("official")
    rows = []
    for name, result in results.items():
        summary = timing.statistics(result.wall)
        ours = name.removeprefix("gear_engine ")
        decoder = str(peak_memory.decode_dtype(ours)).removeprefix("torch.") if ours != name else None
        row: dict[str, Any] = {"images": images, "what": name, "decoder": decoder, "runs": summary["runs"]}
        row |= {f"{key}_s": summary[f"{key}_ms"] / 1e3 for key in ("median", "p10", "p90")}
        row |= {"best_s": min(result.wall), "tokens_s": timing.statistics(result.tokens_s)["median_ms"] / 1e3}
        row |= {"processor_s": min(result.processor)}
        ratios = {"x official": None, "x best": None, "x processor": None}
        if baseline is not None:
            ratios = {
                "x official": timing.statistics(baseline.wall)["median_ms"] / summary["median_ms"],
                "x best": min(baseline.wall) / min(result.wall),
                "x processor": min(baseline.processor) / min(result.processor),
            }
        rows.append({**row, **ratios})
    return rows


def run_case(
    generator: GeneratorConfig, tokenizer: TokenizerConfig, images: int, tokens: int, rounds: int, seed: int,
    checkout: Path | None, ceilings: timing.Ceilings, *, compiled: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Rows and checks of one number of images."""
    weights = generator_weights(generator, seed, torch.device("cpu"))
    coder = build_tokenizer(tokenizer).eval().requires_grad_(False)
    fill(coder)
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, generator.num_classes, (images,), generator=rng).tolist()
    calls = contestants(weights, coder, labels, tokens, checkout, compiled=compiled)
    prepare_s = warm_up(calls, generator.block_size, images)
    results = measure(calls, generator.block_size, rounds, seed)
    checked = check(calls, results, generator.block_size)
    rows = rows_of(results, images)
    for row in rows:
        floor = calls[row["what"]].floor
        row["of_floor_%"] = None if floor is None else 100 * floor(ceilings) / row["best_s"]
    return rows, {**checked, "prepare_s": prepare_s}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.end_to_end", description=__doc__)
    parser.add_argument("--official", type=Path, help="checkout of the official GEAR code")
    parser.add_argument("--model", default="LlamaGen-B", help="a class-conditional preset")
    parser.add_argument("--tokenizer", default="VQ-16", choices=sorted(TOKENIZER_PRESETS))
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, help="tokens per image (the whole grid)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", action="store_true", help="also the official code in bf16 with torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    config, coder = generator_config(options.model), TOKENIZER_PRESETS[options.tokenizer]
    tokens = options.tokens or config.block_size
    rows, checks, memory = [], [], []
    ceilings = timing.measure_ceilings(dtypes=timing.RATE_ORDER)
    print(ceilings, flush=True)
    for images in options.images:
        found, checked = run_case(
            *(config, coder, images, tokens, options.rounds, options.seed, options.official, ceilings),
            compiled=options.compiled,
        )
        print(f"{options.model} and {options.tokenizer}, {images} images, {tokens} tokens, guidance {CFG_SCALE}")
        print(timing.render(found), f"\n{checked}\n", flush=True)
        rows += found
        checks.append(checked)
        if not options.no_memory:
            peaks = [
                peak_memory.measure(options.model, name, images, tokens, options.tokenizer)
                for name in peak_memory.FORMATS
            ]
            print(timing.render(peak_memory.table(peaks)), "\n", flush=True)
            memory += peaks
    if options.json:
        settings = {"model": options.model, "tokenizer": options.tokenizer, "tokens": tokens, "seed": options.seed}
        settings |= {"cfg_scale": CFG_SCALE}
        record = {"settings": settings, "ceilings": ceilings.record(), "rows": rows, "checks": checks, "memory": memory}
        timing.write_json(options.json, {**timing.provenance(), **record})
    return 0 if all(checked["ok"] for checked in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
