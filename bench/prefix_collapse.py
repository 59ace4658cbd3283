"""What the collapsed prefix saves: decode step and cache of a 300-token prompt against an implementation that keeps it.

    python -m gear_engine.bench.prefix_collapse [--tokens N] [--json OUT]        (from the repository's root)

The plain implementation (tests/plain_generator.py) stores and attends to every prefix row. It is compared with the
engine on the same weights and captions: on the reference backend (the same torch products, so that the difference is
the prefix and the static buffers), on the compiled one, and there also with a one-token prompt. Runs alternate; a
figure is the median over the steps after the first of all rounds. Tokens must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gear_engine.config import GENERATOR_PRESETS, GeneratorConfig
from gear_engine.engine import Engine
from gear_engine.kv_cache import StaticKVCache
from gear_engine.models.condition import TextCondition
from gear_engine.models.transformer import Transformer
from gear_engine.request import SamplingParams

try:
    from tests.plain_generator import PlainCache, PlainTransformer, plain_generate
except ImportError:
    sys.exit("the plain implementation is part of the tests: run this from the repository's root")

CFG_SCALE = 4.0


class StepTimes:
    """Seconds between calls, the first interval (prefill) left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def __call__(self, *_: object) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now

    def start(self) -> None:
        self._last = None


def caption(config: GeneratorConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One caption that fills the whole prefix, its mask, and an empty caption under the same mask."""
    shape = (1, config.cls_token_num, config.caption_dim)
    return torch.randn(shape), torch.ones(shape[:2], dtype=torch.bool), torch.randn(shape)


def engine_run(engine: Engine, config: GeneratorConfig, tokens: int, times: StepTimes) -> torch.Tensor:
    torch.manual_seed(1)
    states, mask, empty = caption(config)
    condition = TextCondition(states, mask, empty[0], mask[0])
    times.start()
    params = SamplingParams(cfg_scale=CFG_SCALE)
    return engine.generate(condition, params, rng="torch", max_new_tokens=tokens, callback=times)


def plain_run(model: PlainTransformer, config: GeneratorConfig, tokens: int, times: StepTimes) -> torch.Tensor:
    torch.manual_seed(1)
    states, mask, empty = caption(config)
    times.start()
    return plain_generate(
        model, states, tokens, uncond=empty, mask=mask, uncond_mask=mask, cfg_scale=CFG_SCALE, on_step=times
    )


def measure(tokens: int, rounds: int, layers: int) -> dict[str, Any]:
    """Median step seconds and cache bytes per implementation."""
    config = GENERATOR_PRESETS["GEAR-T2I-B"].replace(n_layer=layers, n_double_stream_layers=max(1, round(layers / 3)))
    short = config.replace(cls_token_num=1)
    torch.manual_seed(0)
    plain = PlainTransformer(config).eval()
    model = Transformer(config).eval()
    model.load_state_dict(plain.state_dict())
    one_token = Transformer(short).eval()
    one_token.load_state_dict(plain.state_dict())
    engines = {
        "engine, reference backend": (Engine(model, max_images=1, backend="reference"), config),
        "engine": (Engine(model, max_images=1), config),
        "engine, one-token prompt": (Engine(one_token, max_images=1), short),
    }
    times = {name: StepTimes() for name in ["plain", *engines]}
    for _ in range(rounds):
        expected = plain_run(plain, config, tokens, times["plain"])
        for name, (engine, its_config) in engines.items():
            found = engine_run(engine, its_config, tokens, times[name])
            if its_config is config and not torch.equal(found, expected):
                raise SystemExit(f"{name}: tokens differ from the plain implementation's")
    rows = 2  # the caption's and the empty caption's
    cache = StaticKVCache.nbytes(config, rows, config.block_size, torch.float32)
    plain_cache = PlainCache(plain, rows, config.cls_token_num + config.block_size).nbytes()
    return {
        "model": f"GEAR-T2I-B, {layers} layers, prompt of {config.cls_token_num} tokens, guidance {CFG_SCALE}, fp32",
        "steps": tokens - 1,
        "rounds": rounds,
        "step_ms": {name: 1e3 * statistics.median(each.seconds) for name, each in times.items()},
        "cache_bytes": {"plain": plain_cache, "engine": cache},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48, help="image tokens per run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with torch.inference_mode():
        result = measure(options.tokens, options.rounds, options.layers)
    plain = result["step_ms"]["plain"]
    print(result["model"])
    for name, step in result["step_ms"].items():
        print(f"  {name:28s}{step:9.2f} ms per step{plain / step:8.2f} x")
    sizes = result["cache_bytes"]
    megabytes = {name: size / 1e6 for name, size in sizes.items()}
    print(f"  cache, 2 rows of 256 tokens: plain {megabytes['plain']:.1f} MB, engine {megabytes['engine']:.1f} MB")
    print(f"  ratio {sizes['plain'] / sizes['engine']:.2f} x")
    if options.json is not None:
        options.json.write_text(json.dumps({"torch": torch.__version__, **result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
