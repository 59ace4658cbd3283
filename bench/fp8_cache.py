"""What an fp8 cache changes: divergence, the share of equal draws under equal noise, memory, and the time of a step.

    python -m gear_engine.bench.fp8_cache [--model LlamaGen-S] [--images 4] [--tokens 64] [--rounds 3] [--json OUT]

Compiled CPU kernels where there are some, random weights, guidance. ``kl`` and ``equal_tokens_%`` are those of an
image's next distribution against fp32, along the tokens that fp32 drew; the other columns are the whole cache and, of
``--rounds`` rollouts of each format in turn, the milliseconds of a step.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from gear_engine import Engine, SamplingParams
from gear_engine.bench import timing
from gear_engine.bench.inputs import generator_config, generator_weights
from gear_engine.bench.rollout import quality
from gear_engine.bench.step_costs import CFG_SCALE
from gear_engine.kv_cache import StaticKVCache
from gear_engine.models.weights import GeneratorWeights

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, fp8 cache": {"cache_dtype": "fp8"},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, fp8 cache": {"dtype": torch.bfloat16, "cache_dtype": "fp8"},
}


def measure(weights: GeneratorWeights, images: int, tokens: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """A row per format."""
    config = weights.config
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, config.num_classes, (images,), generator=rng).tolist()
    engines = {name: Engine(weights, max_images=images, max_new_tokens=tokens, **one) for name, one in FORMATS.items()}
    params = SamplingParams(cfg_scale=CFG_SCALE)
    errors = quality(engines, labels, engines["fp32"].generate(labels, params), seed)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.generate(labels, params)
            seconds[name].append((time.perf_counter() - start) / tokens)
    rows = []
    for name, engine in engines.items():
        size = StaticKVCache.nbytes(config, engine.cache.num_slots, tokens, engine.cache.dtype)
        summary = timing.statistics(seconds[name])
        times = {key: summary[key] for key in ("runs", "median_ms", "p10_ms", "p90_ms")}
        backend = engine.ops.backends["decode_attention"]
        rows.append({"what": name, "attention": backend, **errors[name], "cache_MB": size / 1e6, **times})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.fp8_cache", description=__doc__)
    parser.add_argument("--model", default="LlamaGen-S", help="a class-conditional preset")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    weights = generator_weights(generator_config(options.model), options.seed, torch.device("cpu"))
    rows = measure(weights, options.images, options.tokens, options.rounds, options.seed)
    print(timing.render(rows), flush=True)
    if options.json:
        settings = {"model": options.model, "images": options.images, "tokens": options.tokens, "cfg_scale": CFG_SCALE}
        timing.write_json(options.json, {**timing.provenance(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
