"""What an fp8 cache changes: divergence, and the share of equal draws under equal noise.

    python -m gear_engine.bench.fp8_cache [--model LlamaGen-S] [--images 4] [--tokens 64] [--json OUT]

Plain torch, random weights, along the tokens that fp32 draws: an image's next distribution with keys and values in fp8
(weights and activations in fp32, then in bf16), and with everything in bf16, each against fp32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from gear_engine import Engine, SamplingParams
from gear_engine.bench import timing
from gear_engine.bench.inputs import generator_config, generator_weights
from gear_engine.bench.rollout import CFG_SCALE, divergence_of, guided_logits
from gear_engine.models.weights import GeneratorWeights
from gear_engine.ops.decode_attention import FP8

FORMATS: dict[str, dict[str, Any]] = {
    "fp32, fp8 cache": {"cache_dtype": FP8},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, fp8 cache": {"dtype": torch.bfloat16, "cache_dtype": FP8},
}


def measure(weights: GeneratorWeights, images: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """A row per format."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, weights.config.num_classes, (images,), generator=rng).tolist()
    options: dict[str, Any] = {"max_images": images, "max_new_tokens": tokens, "backend": "reference"}
    exact = Engine(weights, **options)
    drawn = exact.generate(labels, SamplingParams(cfg_scale=CFG_SCALE))
    expected = guided_logits(exact, labels, drawn)
    noise = torch.empty_like(expected).exponential_(1, generator=rng)
    return [
        {
            "what": name,
            **divergence_of(guided_logits(Engine(weights, **options, **one), labels, drawn), expected, noise),
        }
        for name, one in FORMATS.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gear_engine.bench.fp8_cache", description=__doc__)
    parser.add_argument("--model", default="LlamaGen-S", help="a class-conditional preset")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args(arguments)
    weights = generator_weights(generator_config(options.model), options.seed, torch.device("cpu"))
    rows = measure(weights, options.images, options.tokens, options.seed)
    print(timing.render(rows), flush=True)
    if options.json:
        settings = {"model": options.model, "images": options.images, "tokens": options.tokens, "cfg_scale": CFG_SCALE}
        timing.write_json(options.json, {**timing.provenance(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
