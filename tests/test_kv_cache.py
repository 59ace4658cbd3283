"""Layout, size and prefix entries of the static cache."""

from __future__ import annotations

import math

import pytest
import torch

from gear_engine.config import GeneratorConfig
from gear_engine.errors import ConfigError
from gear_engine.kv_cache import StaticKVCache
from gear_engine.ops.decode_attention import dequantize_entries
from tests.models_for_tests import CLASS


@pytest.mark.parametrize(("max_tokens", "entries"), [(1, 8), (7, 8), (8, 16), (16, 24)])
def test_layout(max_tokens: int, entries: int) -> None:
    config = CLASS.replace(n_kv_head=2)
    cache = StaticKVCache(config, 3, max_tokens, torch.bfloat16)
    assert cache.kv.shape == (2, 2, 3, 2, entries, 12)
    assert cache.kv.untyped_storage().nbytes() == StaticKVCache.nbytes(config, 3, max_tokens, torch.bfloat16)
    keys, values = cache.layers[1]
    assert keys.data_ptr() == cache.kv[1, 0].data_ptr()
    assert values.data_ptr() == cache.kv[1, 1].data_ptr()
    assert cache.rope.shape == (16, 6, 2)


def test_prefixes_go_to_their_slots() -> None:
    cache = StaticKVCache(CLASS, 4, 16)
    values = torch.randn(2, 2, 4, 12)
    cache.write_prefix(torch.tensor([3, 1]), values, torch.tensor([math.log(5), -math.inf]))
    assert torch.equal(cache.kv[:, 1, 3, :, 0], values[:, 0])
    assert torch.equal(cache.kv[:, 1, 1, :, 0], values[:, 1])
    assert cache.prefix_bias.tolist() == [0.0, -math.inf, 0.0, pytest.approx(math.log(5))]
    cache.kv[:, 1, [1, 3], :, 0] = 0
    assert (cache.kv == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("slots", [[3, 1, -1, -1], [-1, -1], [2, 3, 0, 1], [3, -1]])
def test_rows_that_are_not_live_start_nothing(slots: list[int], dtype: torch.dtype) -> None:
    """Also where the last slot, which -1 would mean to torch, is in use."""
    caches = [StaticKVCache(CLASS, 4, 16, dtype) for _ in range(2)]
    before = torch.randn(2, 4, 4, 12), torch.randn(4)
    for cache in caches:
        cache.write_prefix(torch.arange(4), *before)
    values, bias, live = torch.randn(2, len(slots), 4, 12), torch.randn(len(slots)), torch.tensor(slots) >= 0
    caches[0].write_prefix(torch.tensor(slots), values, bias, live)
    caches[1].write_prefix(torch.tensor(slots)[live], values[:, live], bias[live])
    assert torch.equal(caches[0].prefix_bias, caches[1].prefix_bias)
    assert torch.equal(caches[0].kv.float(), caches[1].kv.float())
    if dtype != torch.float32:
        assert caches[0].scales is not None
        assert caches[1].scales is not None
        assert torch.equal(caches[0].scales, caches[1].scales)


def test_prompt_length_costs_nothing() -> None:
    text = CLASS.replace(conditioning="text", caption_dim=8, cls_token_num=300)
    assert StaticKVCache.shape(text, 2, 16) == StaticKVCache.shape(CLASS, 2, 16)


def test_rope_turns_rows_then_columns() -> None:
    config = GeneratorConfig(dim=8, n_layer=1, n_head=1, block_size=9, vocab_size=5)
    rope = StaticKVCache(config, 1, 9).rope
    # Token 5 is row 1, column 2; frequencies 1 and 10000^(-1/2).
    angles = torch.tensor([1.0, 0.01, 2.0, 0.02])
    assert torch.allclose(rope[5], torch.stack((angles.cos(), angles.sin()), -1))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "stored"),
    [
        (72, torch.float32, 72),
        (100, torch.float32, 100),
        (100, torch.bfloat16, 104),
        (72, torch.float16, 72),
        (100, torch.float8_e4m3fn, 112),
        (72, torch.float8_e4m3fn, 80),
        (64, torch.float8_e4m3fn, 64),
    ],
)
def test_heads_start_at_multiples_of_16_bytes(head_dim: int, dtype: torch.dtype, stored: int) -> None:
    config = CLASS.replace(dim=2 * head_dim, n_head=2, n_kv_head=2)
    cache = StaticKVCache(config, 3, 16, dtype)
    assert cache.kv.shape[-1] == head_dim
    assert cache.kv.stride() == (2 * 3 * 2 * 24 * stored, 3 * 2 * 24 * stored, 2 * 24 * stored, 24 * stored, stored, 1)
    assert all(stride * dtype.itemsize % 16 == 0 for stride in cache.kv.stride()[:-1])
    in_memory = cache.kv.untyped_storage().nbytes() + (0 if cache.scales is None else cache.scales.nbytes)
    assert StaticKVCache.nbytes(config, 3, 16, dtype) == in_memory


def test_fp8_prefixes() -> None:
    cache = StaticKVCache(CLASS, 4, 16, torch.float8_e4m3fn)
    values = torch.randn(2, 2, 4, 12)
    values[0, 0, 1] = 0
    cache.write_prefix(torch.tensor([3, 1]), values, torch.tensor([math.log(5), 0.0]))
    assert cache.scales is not None
    for row, slot in enumerate((3, 1)):
        found = dequantize_entries(cache.kv[:, 1, slot, :, 0], cache.scales[:, 1, slot, :, 0])
        assert (found - values[:, row]).abs().max() <= values.abs().max() / 16
    assert not dequantize_entries(cache.kv[:, 0], cache.scales[:, 0]).any(), "prefix keys are zero"
    cache.clear()
    assert not cache.kv.float().any()
    assert not cache.scales.any()


def test_bad_sizes() -> None:
    with pytest.raises(ConfigError, match="slot"):
        StaticKVCache(CLASS, 0, 4)
    with pytest.raises(ConfigError, match="block_size"):
        StaticKVCache(CLASS, 1, 17)
