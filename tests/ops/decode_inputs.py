"""A small generator and sequences in the middle of their images, for the ops that make whole steps."""

from __future__ import annotations

import torch

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


def weights_of(name: str) -> GeneratorWeights:
    rng = torch.Generator().manual_seed(1)
    state = {
        key: torch.randn(*shape, generator=rng) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1) + (len(shape) == 1)
        for key, shape in expected_shapes(CONFIG).items()
    }
    dtype, kind = FORMATS[name]
    return GeneratorWeights.from_state_dict(CONFIG, state).to(CPU, dtype, kind)  # type: ignore[arg-type]


def parts_of(cache: StaticKVCache | Sequences) -> tuple[torch.Tensor, ...]:
    """Keys and values, those of an fp8 cache as bytes and with their scales."""
    return (cache.kv,) if cache.scales is None else (cache.kv.view(torch.uint8), cache.scales)


class Sequences:
    """Rows with filled caches of their own, of ``dtype``."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(2)
        shape = StaticKVCache.shape(CONFIG, count, CONFIG.block_size)
        kv = torch.randn(*shape, generator=rng)
        kv[:, 0, :, :, 0] = 0
        self.scales: torch.Tensor | None = None
        if dtype == FP8:
            self.kv, self.scales = quantize_entries(kv)
        else:
            self.kv = kv.to(dtype)
        self.bias = torch.randn(count, generator=rng)
        self.positions = torch.randint(0, CONFIG.block_size, (count,), generator=rng)
        self.tokens = torch.randint(0, CONFIG.vocab_size, (count,), generator=rng)

    def cache(self, order: list[int], slots: list[int]) -> StaticKVCache:
        cache = StaticKVCache(CONFIG, max(slots) + 1, CONFIG.block_size, self.kv.dtype, CPU)
        for here, there in zip(parts_of(cache), parts_of(self), strict=True):
            here[:, :, slots] = there[:, :, order]
        cache.prefix_bias[slots] = self.bias[order]
        return cache

    def step(self, weights: GeneratorWeights, order: list[int], slots: list[int]) -> tuple[torch.Tensor, ...]:
        """Logits, and what :func:`parts_of` the cache hold of the rows' slots afterwards."""
        cache = self.cache(order, slots)
        where = torch.tensor(slots), self.positions[order], self.tokens[order]
        logits = decode_step(weights, cache, CONFIG.n_head, CONFIG.norm_eps, *where, backend="cpu")
        return logits, *(part[:, :, slots] for part in parts_of(cache))
