"""Several steps in one call draw the tokens of the ops that they are made of, and touch nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from gear_engine.config import GeneratorConfig
from gear_engine.kv_cache import StaticKVCache
from gear_engine.ops import GeneratorOps
from gear_engine.ops.decode_attention import FP8
from gear_engine.ops.decode_step import decode_step
from gear_engine.ops.decode_steps import decode_steps
from gear_engine.ops.sample_tokens import SamplingTable, sample_tokens
from gear_engine.request import SamplingParams
from tests.golden_weights import relative_error
from tests.ops.cpu_paths import PATHS, forced, threads
from tests.ops.decode_inputs import CONFIG, CPU, FORMATS, Sequences, cache_dtype_of, odd_configs, parts_of, weights_of

P = SamplingParams
SETTINGS = [P(cfg_scale=3.0, top_k=20), P(), P(cfg_scale=1.5, top_p=0.9), P(sample_logits=False), P(cfg_scale=2.0)]
GUIDED = [params.cfg_scale > 1 for params in SETTINGS]
OWNERS = [0, 1, 2, 3, 4, 0, 2, 4]  # image of every row
STEPS = 4


class Batch:
    """Five images at positions of their own, three of them guided, in slots and table rows out of order."""

    def __init__(
        self,
        cache_dtype: torch.dtype,
        settings: list[SamplingParams] | None = None,
        config: GeneratorConfig = CONFIG,
    ) -> None:
        self.config = config
        rows = list(range(8))
        self.slots = torch.tensor([3, 8, 0, 5, 1, 7, 2, 4])
        self.cache: StaticKVCache = Sequences(8, cache_dtype, config).cache(rows, self.slots.tolist())
        rng = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, config.vocab_size, (10, config.block_size), generator=rng)
        self.token_rows = self.slots[:5].clone()
        self.positions = torch.tensor([1, 50, config.block_size - STEPS, 7, 7])
        self.table = SamplingTable.build(settings or SETTINGS, GUIDED, config.vocab_size, CPU)
        self.seeds = torch.tensor([5, 2**40, 0, 1, 9])

    def run(self, weights: Any, backend: str = "cpu", steps: int = STEPS, **options: Any) -> tuple[int, bool]:
        return decode_steps(
            *(weights, self.cache, self.config.n_head, self.config.norm_eps, self.slots, self.tokens, self.token_rows),
            *(self.positions, self.table, steps),
            backend=backend,
            **{"seeds": self.seeds} | options,
        )

    def run_one_by_one(self, weights: Any, source: torch.Generator | None = None) -> None:
        """``source``: torch draws the noise from it; None means Philox."""
        owners = torch.tensor(OWNERS)
        for drawn in range(STEPS):
            at = self.positions + drawn
            fed = at[owners] - 1
            given = self.tokens[self.token_rows[owners], fed]
            where = self.slots, fed, given
            logits = decode_step(weights, self.cache, self.config.n_head, self.config.norm_eps, *where, backend="cpu")
            noise = None if source is None else torch.empty(5, logits.shape[1]).exponential_(1, generator=source)
            by = {"seeds": self.seeds, "positions": at} if source is None else {"noise": noise}
            draws = sample_tokens(logits, self.table, **by, backend="cpu")
            self.tokens[self.token_rows, at] = draws

    def assert_equal(self, other: Batch) -> None:
        assert torch.equal(self.tokens, other.tokens)
        assert all(torch.equal(*pair) for pair in zip(parts_of(self.cache), parts_of(other.cache), strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMATS)
def test_draws_the_tokens_of_single_steps(path: str, name: str) -> None:
    weights = weights_of(name)
    expected = Batch(cache_dtype_of(name))
    before = expected.tokens.clone()
    with forced(path):
        with threads(1):
            expected.run_one_by_one(weights)
        assert int((expected.tokens != before).sum()) > 15
        for count in (1, 2, 5):
            found = Batch(cache_dtype_of(name))
            with threads(count):
                assert found.run(weights) == (STEPS, True)
            found.assert_equal(expected)


@pytest.mark.parametrize("name", ["float32", "float32, fp8 cache"])
def test_agrees_with_the_reference(name: str) -> None:
    weights = weights_of(name)
    expected, found = Batch(cache_dtype_of(name)), Batch(cache_dtype_of(name))
    assert found.run(weights) == expected.run(weights, "reference") == (STEPS, True)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("own", [True, False])
def test_torchs_stream(path: str, own: bool) -> None:
    """The tokens of single steps whose noise torch drew, in portions; the generator ends where the last step left it,
    and moves no further than the steps that were made."""
    weights = weights_of("float32")
    source = torch.Generator() if own else torch.default_generator
    generator = source if own else None
    with forced(path), threads(2):
        expected = Batch(weights.dtype)
        source.manual_seed(4)
        expected.run_one_by_one(weights, source)
        state = source.get_state()
        found = Batch(weights.dtype)
        source.manual_seed(4)
        for steps, seconds, made in ((2, 1e9, 2), (2, 0.0, 1), (1, 1e9, 1)):
            draws = {"seeds": None, "generator": generator}
            assert found.run(weights, steps=steps, seconds=seconds, **draws) == (made, True)
            found.positions += made
        found.positions -= STEPS
        found.assert_equal(expected)
        assert torch.equal(source.get_state(), state)
        source.manual_seed(4)
        again = Batch(weights.dtype)
        again.run(weights, "reference", seeds=None, generator=generator)
        assert torch.equal(again.tokens, expected.tokens)
        assert torch.equal(source.get_state(), state)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_argmaxes_draw_nothing_from_torchs_stream(backend: str) -> None:
    weights, source = weights_of("float32"), torch.Generator().manual_seed(4)
    state = source.get_state()
    greedy = Batch(weights.dtype, [P(cfg_scale=each.cfg_scale, sample_logits=False) for each in SETTINGS])
    assert greedy.run(weights, backend, seeds=None, generator=source) == (STEPS, True)
    assert torch.equal(source.get_state(), state)


def test_a_refused_call_draws_nothing() -> None:
    weights, source = weights_of("float32"), torch.Generator().manual_seed(4)
    state = source.get_state()
    found = Batch(weights.dtype)
    found.positions[1] = 0
    with pytest.raises(IndexError):
        found.run(weights, seeds=None, generator=source)
    assert torch.equal(source.get_state(), state)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=odd_configs())
def test_agrees_with_the_reference_on_odd_shapes(config: GeneratorConfig, isa: str) -> None:
    weights = weights_of("float32", config)
    expected, found = (Batch(torch.float32, config=config) for _ in range(2))
    assert found.run(weights) == expected.run(weights, "reference") == (STEPS, True)
    assert torch.equal(found.tokens, expected.tokens)
    assert relative_error(found.cache.kv, expected.cache.kv) <= 1e-5


def test_steps_come_in_any_portions() -> None:
    weights = weights_of("bfloat16, int8 weights")
    expected, found = Batch(weights.dtype), Batch(weights.dtype)
    expected.run(weights)
    assert found.run(weights, steps=1) == (1, True)
    found.positions += 1
    assert found.run(weights, steps=3, seconds=0.0) == (1, True), "no time for another step"
    found.positions += 1
    assert found.run(weights, steps=2, seconds=1e9) == (2, True)
    found.assert_equal(expected)


@pytest.mark.parametrize("row", range(8))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tells_when_logits_are_not_finite(backend: str, row: int) -> None:
    weights = weights_of("float32")
    found = Batch(weights.dtype)
    found.cache.kv[-1, 1, found.slots[row], 1, 0] = float("nan")
    assert found.run(weights, backend) == (STEPS, False)


@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("slots", 7, 9),
        ("slots", 0, -1),
        ("token_rows", 4, 10),
        ("token_rows", 0, -1),
        ("positions", 1, 0),
        ("positions", 2, CONFIG.block_size - STEPS + 1),
        ("positions", 1, 2**62),
        ("uncond_rows", 0, 8),
        ("uncond_rows", 0, 1),
        ("uncond_rows", 0, 6),
        ("uncond_rows", 2, -1),
        ("uncond_rows", 1, -2),
    ],
)
def test_indices_are_checked_before_anything_is_written(field: str, index: int, value: int) -> None:
    weights = weights_of("float32")
    found = Batch(weights.dtype)
    getattr(found.table if field == "uncond_rows" else found, field)[index] = value
    with pytest.raises(IndexError):
        found.run(weights)
    found.assert_equal(Batch(weights.dtype))


def test_a_first_token_outside_the_vocabulary() -> None:
    weights = weights_of("float32")
    found, expected = Batch(weights.dtype), Batch(weights.dtype)
    found.tokens[8, 49] = expected.tokens[8, 49] = CONFIG.vocab_size
    with pytest.raises(IndexError, match="vocabulary"):
        found.run(weights)
    found.assert_equal(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(7, dtype=torch.int64)}, "slots"),
        ({"seeds": torch.zeros(5, dtype=torch.int32)}, "seeds"),
        ({"positions": torch.ones(8, dtype=torch.int64)}, "positions"),
        ({"token_rows": torch.zeros(5)}, "token_rows"),
        ({"tokens": torch.zeros(10, 200, dtype=torch.int64)[:, ::2]}, "contiguous"),
        ({"tokens": torch.zeros(10, 100, dtype=torch.int32)}, "int64"),
    ],
)
def test_tensors_must_fit(change: dict[str, torch.Tensor], message: str) -> None:
    weights = weights_of("float32")
    found = Batch(weights.dtype)
    vars(found).update(change)
    with pytest.raises(ValueError, match=message):
        found.run(weights)


def test_there_must_be_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Batch(torch.float32).run(weights_of("float32"), steps=0)


def test_is_what_runs_where_all_parts_are_compiled() -> None:
    assert GeneratorOps.resolve(CPU, torch.bfloat16, "cpu").decode_steps is not None
    assert GeneratorOps.resolve(CPU, torch.float32, cache_dtype=FP8).decode_steps is not None
    for op in ("skinny_linear", "decode_attention", "sample_tokens"):
        assert GeneratorOps.resolve(CPU, torch.float32, {op: "reference"}).decode_steps is None
