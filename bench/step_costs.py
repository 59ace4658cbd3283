"""What a decode step must read and multiply, and how much of a rollout's time passes outside the compiled calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from gear_engine import Engine, SamplingParams
from gear_engine.config import GeneratorConfig
from gear_engine.ops import native

CFG_SCALE = 4.0
#: Format of :data:`gear_engine.bench.peak_memory.FORMATS` -> dtype whose multiply rate bounds its products.
RATE_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def step_bytes(engine: Engine, images: int, tokens: int) -> float:
    """Bytes that an average step must read: every linear weight once, and the rows' keys and values so far."""
    weights = engine.weights
    linear = weights.output.nbytes
    for block in weights.blocks:
        linear += sum(weight.nbytes for weight in (block.wqkv, block.wo, block.w1, block.w3, block.w2))
    config = weights.config
    entry = 2 * config.n_layer * config.kv_dim * engine.dtype.itemsize
    return linear + 2 * images * entry * (tokens / 2 + 1)


def step_ops(config: GeneratorConfig, images: int, tokens: int) -> float:
    """Operations of an average step's products, guided: linear layers, scores and weighted values; an FMA is two."""
    rows, width = 2 * images, config.n_head * config.head_dim
    block = config.dim * (config.qkv_dim + width + 3 * config.ffn_dim)
    attention = 2 * width * (tokens / 2 + 1)
    return 2 * rows * (config.n_layer * (block + attention) + config.dim * config.vocab_size)


class _Clock:
    """Seconds inside the compiled calls of a step."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def share_outside(engine: Engine, labels: list[int], tokens: int, rng: Literal["torch", "philox"]) -> float:
    """Percent of a rollout's time spent outside the compiled calls: in Python and torch."""
    module = native.module()
    clock = _Clock()
    names = ("decode_step_cpu", "decode_steps_cpu", "sample_tokens_cpu", "skinny_linear_cpu", "torch_exponential_cpu")
    kept = {name: getattr(module, name) for name in names}
    try:
        for name, function in kept.items():
            setattr(module, name, clock.around(function))
        start = time.perf_counter()
        engine.generate(labels, SamplingParams(cfg_scale=CFG_SCALE), rng=rng, max_new_tokens=tokens)
        total = time.perf_counter() - start
    finally:
        for name, function in kept.items():
            setattr(module, name, function)
    return 100 * (1 - clock.seconds / total)
