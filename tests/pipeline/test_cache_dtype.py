"""A pipeline over an fp8 cache: the engine's tokens, its refusals and its memory plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine import memory
from gear_engine.engine import Engine
from gear_engine.errors import CheckpointError, ConfigError, OutOfMemoryError
from gear_engine.kv_cache import StaticKVCache
from gear_engine.pipeline import Pipeline
from gear_engine.request import SamplingParams
from gear_engine.tokenizers import Tokenizer
from tests.pipeline.models import make_generator

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("cache_dtype", ["fp8", FP8])
@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_an_fp8_cache_draws_what_the_engine_draws(tokenizer: Tokenizer, cache_dtype: Any, rng: str) -> None:
    """Under seeds and in the official order."""
    labels = [1, 2, 3]
    params = SamplingParams(cfg_scale=4.0)
    source = {"seeds": [4, 5, 6]} if rng == "philox" else {"generator": torch.Generator().manual_seed(4)}
    pipe = Pipeline(make_generator(), tokenizer, cache_dtype=cache_dtype, max_images=3)
    pipe.set_progress_bar_config(disable=True)
    tokens = pipe(labels, output_type="latent", **source).tokens
    if rng == "torch":
        source = {"generator": torch.Generator().manual_seed(4)}
    engine = Engine(make_generator(), cache_dtype=FP8, max_images=3)
    assert torch.equal(tokens, engine.generate(labels, params, rng=rng, **source))  # type: ignore[arg-type]
    assert pipe._engine is not None
    assert pipe._engine.cache.dtype == engine.cache.dtype == FP8


def test_an_fp8_cache_after_from_pretrained(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    for dtype in (None, torch.bfloat16):
        loaded = Pipeline.from_pretrained(tmp_path / "model", dtype=dtype, cache_dtype="fp8")
        loaded.set_progress_bar_config(disable=True)
        tokens = loaded([1, 2], seeds=[1, 2], output_type="latent").tokens
        engine = Engine(loaded.generator, dtype=dtype, cache_dtype="fp8")
        assert torch.equal(tokens, engine.generate([1, 2], SamplingParams(cfg_scale=4.0), seeds=[1, 2]))
        assert loaded._engine is not None
        assert (loaded._engine.cache.dtype, loaded._engine.dtype) == (FP8, dtype or torch.float32)


@pytest.mark.parametrize("cache_dtype", ["fp4", "float8_e4m3fn", torch.float16, torch.float8_e5m2])
def test_other_cache_dtypes_are_refused_before_a_file_is_read(tokenizer: Tokenizer, cache_dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"a cache holds torch.float32 .* or 'fp8'"):
        Pipeline(make_generator(), tokenizer, cache_dtype=cache_dtype)
    with pytest.raises(ConfigError, match="a cache holds"):
        Pipeline.from_pretrained("nothing/here", dtype=torch.float32, cache_dtype=cache_dtype)


def test_a_name_that_is_none_is_refused_whatever_the_file_holds() -> None:
    with pytest.raises(ConfigError, match="'fp4'"):
        Pipeline.from_pretrained("nothing/here", cache_dtype="fp4")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError):
        Pipeline.from_pretrained("nothing/here", cache_dtype="fp8")


def test_an_fp8_cache_is_in_the_memory_plan(tokenizer: Tokenizer) -> None:
    """A budget that holds the plan to the byte: a byte less, and a wider cache, are refused with the arithmetic."""
    generator, images = make_generator(), 40
    config, weights = generator.config, generator.weights()
    plan = memory.engine_plan(
        config, num_slots=2 * images, max_tokens=16, dtype=weights.dtype, cache_dtype=FP8, weight_bytes=0
    )
    assert plan["key/value cache"] < 0.35 * StaticKVCache.nbytes(config, 2 * images, 16, weights.dtype)
    size = config.grid_size * tokenizer.config.downsample
    budget = sum(plan.values()) + memory.decoder_bytes(tokenizer.config, size, size, 8, tokenizer.dtype)
    options: dict[str, Any] = {"max_images": images, "memory_budget": budget}
    pipe = Pipeline(generator, tokenizer, cache_dtype="fp8", **options)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(1, seeds=1, output_type="latent").tokens.shape == (1, 16)
    for wrong in ({}, {"cache_dtype": "fp8", "memory_budget": budget - 1}):
        refused = Pipeline(generator, tokenizer, **{**options, **wrong})
        refused.set_progress_bar_config(disable=True)
        with pytest.raises(OutOfMemoryError, match=r"key/value cache .* GiB are available"):
            refused(1, seeds=1)
