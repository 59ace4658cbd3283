"""A small generator and sequences in the middle of their images, for the ops that make whole steps."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from gear_engine.config import GeneratorConfig
from gear_engine.kv_cache import StaticKVCache
from gear_engine.models.weights import GeneratorWeights, expected_shapes
from gear_engine.ops.decode_attention import FP8, quantize_entries
from gear_engine.ops.decode_step import decode_step

CPU = torch.device("cpu")
CONFIG = GeneratorConfig(
    dim=144, n_layer=3, n_head=4, n_kv_head=2, ffn_dim=200, vocab_size=301, block_size=100, num_classes=10
)
FORMATS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16 packed": (torch.bfloat16, "bf16"),
    "float32, bf16 weights": (torch.float32, "bf16"),
    "bfloat16, int8 weights": (torch.bfloat16, "int8"),
    "float32, fp8 cache": (torch.float32, None),
    "bfloat16 packed, fp8 cache": (torch.bfloat16, "bf16"),
}


def cache_dtype_of(name: str) -> torch.dtype:
    """Of a format's keys and values."""
    return FP8 if name.endswith("fp8 cache") else FORMATS[name][0]


def weights_of(name: str, config: GeneratorConfig = CONFIG) -> GeneratorWeights:
    rng = torch.Generator().manual_seed(1)
    state = {
        key: torch.randn(*shape, generator=rng) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1) + (len(shape) == 1)
        for key, shape in expected_shapes(config).items()
    }
    dtype, kind = FORMATS[name]
    return GeneratorWeights.from_state_dict(config, state).to(CPU, dtype, kind)  # type: ignore[arg-type]


def parts_of(cache: StaticKVCache | Sequences) -> tuple[torch.Tensor, ...]:
    """Keys and values, those of an fp8 cache as bytes and with their scales."""
    return (cache.kv,) if cache.scales is None else (cache.kv.view(torch.uint8), cache.scales)


@st.composite
def odd_configs(draw: st.DrawFn) -> GeneratorConfig:
    """Small generators of any shape that a checkpoint may have: no width is a multiple of a vector's or panel's."""
    head_dim, n_kv_head = 4 * draw(st.integers(4, 19)), draw(st.integers(1, 2))
    n_head = n_kv_head * draw(st.integers(1, 3))
    return GeneratorConfig(
        dim=n_head * head_dim,
        n_layer=draw(st.integers(1, 2)),
        n_head=n_head,
        n_kv_head=n_kv_head,
        ffn_dim=draw(st.integers(1, 150)),
        vocab_size=draw(st.integers(30, 210)),
        block_size=draw(st.sampled_from([64, 81])),
        num_classes=3,
    )


class Sequences:
    """Rows with filled caches of their own, of ``dtype``."""

    def __init__(self, count: int, dtype: torch.dtype, config: GeneratorConfig = CONFIG) -> None:
        self.config = config
        rng = torch.Generator().manual_seed(2)
        shape = StaticKVCache.shape(config, count, config.block_size)
        kv = torch.randn(*shape, generator=rng)
        kv[:, 0, :, :, 0] = 0
        self.scales: torch.Tensor | None = None
        if dtype == FP8:
            self.kv, self.scales = quantize_entries(kv)
        else:
            self.kv = kv.to(dtype)
        self.bias = torch.randn(count, generator=rng)
        self.positions = torch.randint(0, config.block_size, (count,), generator=rng)
        self.tokens = torch.randint(0, config.vocab_size, (count,), generator=rng)

    def cache(self, order: list[int], slots: list[int]) -> StaticKVCache:
        cache = StaticKVCache(self.config, max(slots) + 1, self.config.block_size, self.kv.dtype, CPU)
        for here, there in zip(parts_of(cache), parts_of(self), strict=True):
            here[:, :, slots] = there[:, :, order]
        cache.prefix_bias[slots] = self.bias[order]
        return cache

    def step(self, weights: GeneratorWeights, order: list[int], slots: list[int]) -> tuple[torch.Tensor, ...]:
        """Logits, and what :func:`parts_of` the cache hold of the rows' slots afterwards."""
        cache = self.cache(order, slots)
        where = torch.tensor(slots), self.positions[order], self.tokens[order]
        logits = decode_step(weights, cache, self.config.n_head, self.config.norm_eps, *where, backend="cpu")
        return logits, *(part[:, :, slots] for part in parts_of(cache))
