"""The whole step in one call has the bits of the calls that it replaces, in any batch on any threads."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gear_engine.config import GeneratorConfig
from gear_engine.ops import GeneratorOps, backends
from gear_engine.ops.decode_attention import FP8
from gear_engine.ops.decode_step import decode_step, reference
from gear_engine.runner import decode_step as run_step
from tests.golden_weights import relative_error
from tests.ops.cpu_paths import PATHS, forced, threads
from tests.ops.decode_inputs import CONFIG, CPU, FORMATS, Sequences, cache_dtype_of, odd_configs, parts_of, weights_of


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMATS)
def test_has_the_bits_of_the_ops_one_by_one(path: str, name: str) -> None:
    weights, cache_dtype = weights_of(name), cache_dtype_of(name)
    sequences = Sequences(5, cache_dtype)
    rows = list(range(5))
    with forced(path):
        logits, *parts = sequences.step(weights, rows, rows)
        ops = dataclasses.replace(GeneratorOps.resolve(CPU, weights.dtype, "cpu", cache_dtype), decode_step=None)
        cache = sequences.cache(rows, rows)
        expected = run_step(weights, ops, cache, torch.arange(5), sequences.positions, sequences.tokens)
    assert logits.dtype == torch.float32
    # One by one, logits pass through the activations' dtype.
    assert torch.equal(logits.to(weights.dtype).float(), expected)
    assert all(torch.equal(*pair) for pair in zip(parts, parts_of(cache), strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMATS)
def test_bits_do_not_depend_on_batch_slot_or_threads(path: str, name: str) -> None:
    weights = weights_of(name)
    sequences = Sequences(34, cache_dtype_of(name))
    with forced(path):
        with threads(1):
            alone = [sequences.step(weights, [row], [0]) for row in range(34)]
        for count, rows in ((1, 34), (2, 1), (2, 3), (2, 16), (5, 8), (5, 17), (5, 34)):
            with threads(count):
                order = torch.randperm(34)[:rows].tolist()
                logits, *parts = sequences.step(weights, order, torch.randperm(rows + 3)[:rows].tolist())
                assert torch.equal(logits, torch.cat([alone[row][0] for row in order]))
                for i, part in enumerate(parts, start=1):
                    assert torch.equal(part, torch.cat([alone[row][i] for row in order], dim=2))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float32, fp8 cache"])
def test_agrees_with_the_reference(path: str, name: str) -> None:
    weights = weights_of(name)
    sequences = Sequences(3, cache_dtype_of(name))
    rows = list(range(3))
    with forced(path):
        logits, *parts = sequences.step(weights, rows, rows)
    cache = sequences.cache(rows, rows)
    expected = reference(
        weights, cache, CONFIG.n_head, CONFIG.norm_eps, torch.arange(3), sequences.positions, sequences.tokens
    )
    # Over an fp8 cache a last bit of a layer's input may move a key to the next number, a 16th of its size away.
    tolerance = 1e-5 if name == "float32" else 4e-2
    assert relative_error(logits, expected) <= tolerance
    if sequences.scales is None:
        assert relative_error(*parts, cache.kv) <= tolerance
    else:
        for part, wanted in zip(parts, parts_of(cache), strict=True):
            assert (part != wanted).float().mean() < 1e-3


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=odd_configs(),
    rows=st.integers(1, 9),
    name=st.sampled_from(["float32", "bfloat16 packed", "float32, bf16 weights"]),
)
def test_agrees_with_the_reference_on_odd_shapes(config: GeneratorConfig, rows: int, name: str, isa: str) -> None:
    weights, sequences, every = weights_of(name, config), Sequences(rows, cache_dtype_of(name), config), range(rows)
    logits, kv = sequences.step(weights, list(every), list(every))
    cache = sequences.cache(list(every), list(every))
    where = torch.arange(rows), sequences.positions, sequences.tokens
    expected = reference(weights, cache, config.n_head, config.norm_eps, *where)
    assert relative_error(logits, expected) <= (1e-5 if name == "float32" else 4e-2)
    assert relative_error(kv, cache.kv) <= (1e-5 if name == "float32" else 4e-2)


def test_is_what_the_compiled_backend_runs() -> None:
    assert GeneratorOps.resolve(CPU, torch.float32, "cpu").decode_step is not None
    assert GeneratorOps.resolve(CPU, torch.bfloat16, cache_dtype=FP8).decode_step is not None
    assert GeneratorOps.resolve(CPU, torch.float16, cache_dtype=FP8).decode_step is None
    assert GeneratorOps.resolve(CPU, torch.float32, "reference").decode_step is None
    assert GeneratorOps.resolve(CPU, torch.float32, {"decode_attention": "reference"}).decode_step is None


@pytest.mark.parametrize(("field", "value"), [("tokens", 301), ("tokens", -1), ("positions", 100), ("slots", 5)])
def test_indices_are_checked_before_anything_is_written(field: str, value: int) -> None:
    weights = weights_of("float32")
    sequences = Sequences(2, torch.float32)
    cache = sequences.cache([0, 1], [0, 1])
    indices = {"slots": torch.arange(2), "positions": sequences.positions, "tokens": sequences.tokens}
    indices[field] = torch.tensor([0, value])
    with pytest.raises(IndexError, match=field.removesuffix("s")):
        decode_step(weights, cache, CONFIG.n_head, CONFIG.norm_eps, **indices, backend="cpu")
    assert torch.equal(cache.kv, sequences.kv)


def test_weights_must_fit_the_cache() -> None:
    sequences = Sequences(1, torch.bfloat16)
    where = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="dtype"):
        decode_step(
            weights_of("float32"), sequences.cache([0], [0]), CONFIG.n_head, 1e-5, where, where, where, backend="cpu"
        )


def test_a_bound_step_follows_its_operands() -> None:
    """The description that the compiled step keeps is made anew for other weights or another cache."""
    run = backends.resolve("decode_step", CPU, torch.float32, "cpu").load()
    first, second = weights_of("float32"), weights_of("float32")
    second.tok_embeddings.mul_(-1)
    index = torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([5, 6])
    caches = [Sequences(2, torch.float32).cache([0, 1], [0, 1]) for _ in range(2)]
    caches[1].kv.mul_(0.5)
    for weights, cache in ((first, caches[0]), (second, caches[0]), (second, caches[1]), (first, caches[0])):
        arguments = (weights, cache, CONFIG.n_head, CONFIG.norm_eps, *index)
        assert torch.equal(run(*arguments), decode_step(*arguments, backend="cpu"))
    kept = weakref.ref(second)
    del weights, second, arguments
    gc.collect()
    assert kept() is None
