"""The engine: draws that do not depend on company, requests that come and go, errors that leave it usable."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gear_engine import runner
from gear_engine.engine import Engine, FinishedImage
from gear_engine.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    NumericalError,
    OutOfMemoryError,
)
from gear_engine.kv_cache import StaticKVCache
from gear_engine.models.condition import TextCondition
from gear_engine.request import ImageRequest, SamplingParams
from tests.models_for_tests import CLASS, NULL_TEXT, TEXT, captions, fresh_model, small_model
from tests.token_ties import count_ties, philox_scores

P = SamplingParams
GUIDED = P(cfg_scale=3.0, top_k=30)
SETTINGS = [
    P(),
    P(cfg_scale=4.0, temperature=0.9, top_k=20),
    P(cfg_scale=2.5, cfg_interval=5, top_p=0.9),
    P(cfg_scale=1.75, temperature=1.1, top_p=0.95),
    P(sample_logits=False),
    P(cfg_scale=2.0, cfg_interval=0),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models: threads only wait for each other, endlessly on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _scores(label: int, params: SamplingParams, seed: int, tokens: torch.Tensor) -> torch.Tensor:
    """Scores of the next token by the parallel forward."""
    with torch.no_grad():
        both = small_model()(tokens[None].long().expand(2, -1), torch.tensor([label, CLASS.num_classes]))[:, -1]
    return philox_scores(both[0], both[1], params, seed, len(tokens))


def _assert_equal(found: torch.Tensor, expected: torch.Tensor, label: int, params: SamplingParams, seed: int) -> None:
    ties = count_ties(expected, found, params, lambda tokens: _scores(label, params, seed, tokens))
    assert ties == 0, "a tie among the fixed inputs of this test: choose other seeds"


class TestPhilox:
    labels = (0, 3, 9, 5, 5, 1, 8, 2)
    seeds = (11, 0, 7, 2**63 - 1, 2**40, 3, 4, 5)

    def alone(self, index: int) -> torch.Tensor:
        engine = Engine(small_model(), max_images=1)
        params = SETTINGS[index % len(SETTINGS)]
        return engine.generate([self.labels[index]], params, seeds=[self.seeds[index]])[0]

    @pytest.mark.parametrize("max_images", [1, 3, 8])
    def test_same_tokens_in_any_batch_and_order(self, max_images: int) -> None:
        order = random.Random(max_images).sample(range(8), 8)
        engine = Engine(small_model(), max_images=max_images)
        tokens = engine.generate(
            [self.labels[i] for i in order],
            [SETTINGS[i % len(SETTINGS)] for i in order],
            seeds=[self.seeds[i] for i in order],
        )
        for row, i in enumerate(order):
            _assert_equal(tokens[row], self.alone(i), self.labels[i], SETTINGS[i % len(SETTINGS)], self.seeds[i])

    @pytest.mark.parametrize("max_images", [2, 3])
    def test_requests_join_and_leave(self, max_images: int) -> None:
        """Requests of other lengths and settings start while this one runs; slots are used again."""
        engine = Engine(small_model(), max_images=max_images)
        wanted, done = {}, {}
        rng = random.Random(0)
        lengths = [16, 5, 1, 16, 9, 16, 2, 16]
        pending = list(range(8))
        while pending or engine.num_unfinished:
            if pending and rng.random() < 0.4:
                i = pending.pop(0)
                request = ImageRequest(
                    label=self.labels[i],
                    seed=self.seeds[i],
                    params=SETTINGS[i % len(SETTINGS)],
                    max_new_tokens=lengths[i],
                )
                wanted[engine.add_request(request)] = i
            for finished in engine.step():
                done[finished.request_id] = finished.tokens
        assert sorted(done) == sorted(wanted)
        for request_id, i in wanted.items():
            expected = self.alone(i)[: lengths[i]]
            _assert_equal(done[request_id], expected, self.labels[i], SETTINGS[i % len(SETTINGS)], self.seeds[i])

    def test_seed_and_label_matter(self) -> None:
        tokens = Engine(small_model()).generate([1, 1, 2], seeds=[0, 1, 0])
        assert not torch.equal(tokens[0], tokens[1])
        assert not torch.equal(tokens[0], tokens[2])

    def test_texts_in_any_company(self) -> None:
        everyone = captions()
        together = Engine(small_model(TEXT), max_images=6).generate(everyone, GUIDED)
        for i in range(len(everyone)):
            request = ImageRequest(
                caption=everyone.states[i],
                caption_mask=everyone.mask[i],  # type: ignore[index]
                null_caption=everyone.uncond_states,
                null_caption_mask=everyone.uncond_mask,
                seed=i,
                params=GUIDED,
            )
            engine = Engine(small_model(TEXT), max_images=2)
            engine.add_request(request)
            assert torch.equal(_drain(engine)[0].tokens, together[i])


def _drain(engine: Engine) -> list[FinishedImage]:
    found = []
    while engine.num_unfinished:
        found += engine.step()
    return found


class TestTorchGenerator:
    def test_ends_where_the_official_code_leaves_it(self) -> None:
        engine = Engine(small_model(), max_images=3)
        torch.manual_seed(3)
        engine.generate([1, 2, 3], GUIDED, rng="torch", max_new_tokens=5)
        left = torch.get_rng_state()
        torch.manual_seed(3)
        for _ in range(5):
            torch.empty(3, CLASS.vocab_size).exponential_(1)
        assert torch.equal(torch.get_rng_state(), left)

    def test_argmax_draws_nothing(self) -> None:
        before = torch.get_rng_state()
        Engine(small_model()).generate([1, 2], P(sample_logits=False), rng="torch", max_new_tokens=3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_own_generator_leaves_the_global_one_alone(self) -> None:
        engine = Engine(small_model())
        before = torch.get_rng_state()
        own = [torch.Generator().manual_seed(4) for _ in range(2)]
        first, second = (engine.generate([1, 2], rng="torch", generator=g, max_new_tokens=4) for g in own)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, second)
        torch.manual_seed(4)
        assert torch.equal(engine.generate([1, 2], rng="torch", max_new_tokens=4), first)

    def test_is_for_whole_batches(self) -> None:
        engine = Engine(small_model(), max_images=2)
        with pytest.raises(InvalidRequestError, match="max_images >= 3"):
            engine.generate([1, 2, 3], rng="torch")
        with pytest.raises(InvalidRequestError, match="generate"):
            engine.add_request(ImageRequest(label=1), rng="torch")
        assert engine.num_unfinished == 0


@pytest.mark.parametrize("config", [CLASS, CLASS.replace(n_kv_head=2), CLASS.replace(n_kv_head=1, dim=72, n_head=2)])
def test_greedy_tokens_follow_the_parallel_forward(config: Any) -> None:
    model = small_model(config)
    labels = torch.tensor([0, 4, 9])
    tokens = Engine(model).generate(labels, P(sample_logits=False)).long()
    with torch.no_grad():
        logits = model(tokens[:, :-1], labels)
    assert torch.equal(logits.argmax(-1), tokens)


@pytest.mark.parametrize("text_attn", ["causal", "prefix"])
@pytest.mark.parametrize("double", [0, 1, 2])
def test_collapsed_prefix_follows_the_parallel_forward(text_attn: str, double: int) -> None:
    """Every padding, and no valid token at all, against the whole masked sequence."""
    model = small_model(TEXT.replace(text_attn=text_attn, n_double_stream_layers=double, n_kv_head=2))
    condition = captions(null=False)
    tokens = Engine(model, max_images=6).generate(condition, P(sample_logits=False)).long()
    with torch.no_grad():
        logits = model(tokens[:, :-1], condition)[:, TEXT.cls_token_num - 1 :]
    assert torch.equal(logits.argmax(-1), tokens)


def test_a_caption_without_mask_is_all_valid() -> None:
    engine = Engine(small_model(TEXT))
    condition = captions()
    some = TextCondition(condition.states[:2], None, condition.uncond_states)
    same = TextCondition(some.states, torch.ones(2, 7), condition.uncond_states, torch.ones(7))
    assert torch.equal(engine.generate(some, GUIDED), engine.generate(same, GUIDED))


class TestWork:
    """What is computed, counted through the ops."""

    @staticmethod
    def rows_of(engine: Engine, op: str = "decode_attention") -> list[tuple[int, int]]:
        """(rows, output width) of every call of ``op`` from now on."""
        calls: list[tuple[int, int]] = []
        run = getattr(engine.ops, op)

        def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            out: torch.Tensor = run(x, *args, **kwargs)
            calls.append((out.shape[0], out.shape[1]))
            return out

        object.__setattr__(engine.ops, op, spy)
        return calls

    def test_unconditional_rows_leave_when_guidance_ends(self) -> None:
        engine = Engine(small_model(), max_images=3, backend="reference")
        calls = self.rows_of(engine)
        before = engine.cache.kv.data_ptr()
        engine.generate([1, 2, 3], P(cfg_scale=2.0, cfg_interval=4), rng="torch", max_new_tokens=10)
        rows = [count for count, _ in calls[:: CLASS.n_layer]]
        # Decode step i draws image token i + 1; steps 0 ... 4 are guided.
        assert rows == [6] * 5 + [3] * 4
        assert engine.cache.kv.data_ptr() == before

    def test_no_guidance_no_unconditional_rows(self) -> None:
        engine = Engine(small_model(), max_images=2, backend="reference")
        calls = self.rows_of(engine)
        engine.generate([1, 2], P(cfg_scale=1.0), max_new_tokens=4)
        assert {count for count, _ in calls} == {2}

    def test_prompts_cost_their_valid_rows_and_only_values(self) -> None:
        engine = Engine(small_model(TEXT), max_images=6, backend="reference")
        calls = self.rows_of(engine, "skinny_linear")
        condition = captions(null=False)
        engine.generate(condition, max_new_tokens=1)
        assert condition.mask is not None
        packed = int(condition.mask.sum() + (~condition.mask[:, -1]).sum())
        assert calls[0] == (packed, TEXT.kv_dim)
        assert all(rows in (packed, 6) for rows, _ in calls)
        assert max(width for _, width in calls[:-1]) < TEXT.qkv_dim

    def test_null_captions_are_computed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoded: list[int] = []

        def spy(weights: Any, ops: Any, rows: Any) -> runner.PrefixState:
            encoded.append(len(rows.valid))
            return runner.encode_prefix(weights, ops, rows)

        monkeypatch.setattr("gear_engine.prefixes.encode_prefix", spy)
        engine = Engine(small_model(TEXT), max_images=6)
        first = engine.generate(captions(), GUIDED, max_new_tokens=3)
        assert encoded == [6, 1]
        again = engine.generate(captions(), GUIDED, max_new_tokens=3)
        assert encoded == [6, 1, 6]
        assert torch.equal(first, again)
        engine.invalidate()
        engine.generate(captions(), GUIDED, max_new_tokens=3)
        assert encoded == [6, 1, 6, 6, 1]
        encoded.clear()
        Engine(small_model(NULL_TEXT), max_images=6).generate(captions(null=False), GUIDED, max_new_tokens=1)
        assert encoded == [6, 6], "a learned null caption takes each caption's mask"

    def test_long_prompts_go_through_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = Engine(small_model(TEXT), max_images=6).generate(captions(), GUIDED)
        monkeypatch.setattr("gear_engine.prefixes.MAX_ROWS", 14)
        assert torch.equal(Engine(small_model(TEXT), max_images=6).generate(captions(), GUIDED), whole)

    def test_the_cache_is_allocated_once(self) -> None:
        engine = Engine(small_model(), max_images=3)
        buffers = engine.cache.kv.data_ptr(), engine.cache.kv.shape
        engine.generate([1, 2, 3], GUIDED)
        engine.generate([4], P())
        assert (engine.cache.kv.data_ptr(), engine.cache.kv.shape) == buffers


class TestWeights:
    def test_are_read_in_place(self) -> None:
        model = fresh_model()
        engine = Engine(model)
        before = engine.generate([1], seeds=[0])
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.flip(0))
        after = engine.generate([1], seeds=[0])
        assert not torch.equal(before, after)
        assert torch.equal(after, Engine(model).generate([1], seeds=[0]))
        assert {w.data_ptr() for _, w in engine.weights._named()} == {p.data_ptr() for p in model.parameters()}

    @pytest.mark.parametrize("backend", ["reference", "auto"])
    def test_strides_do_not_matter(self, backend: str) -> None:
        model = fresh_model()
        expected = Engine(model, backend=backend).generate([1, 2], GUIDED)
        assert model.weights().nbytes_as(torch.float32) == 0
        for parameter in model.parameters():
            wide = torch.zeros(*parameter.shape, 2)
            wide[..., 0] = parameter.data
            parameter.data = wide[..., 0]
        weights = model.weights()
        assert weights.nbytes_as(torch.float32) == weights.nbytes, "copies are planned for"
        assert torch.equal(Engine(model, backend=backend).generate([1, 2], GUIDED), expected)

    def test_weights_in_two_places_or_none(self) -> None:
        model = fresh_model()
        model.layers[1].to("meta")
        with pytest.raises(CheckpointError, match=r"layers\.1\.attention_norm\.weight is meta.*which is cpu"):
            Engine(model)
        with pytest.raises(ConfigError, match="meta device"):
            Engine(model.to("meta"))

    def test_layers_wrapped_by_compile(self) -> None:
        model = fresh_model()
        expected = Engine(model).generate([1])
        model.layers[0] = torch.compile(model.layers[0])
        assert torch.equal(Engine(model).generate([1]), expected)

    def test_bind_swaps_and_releases(self) -> None:
        engine = Engine(small_model())
        before = engine.generate([1])
        other = fresh_model()
        other.output.weight.data.mul_(-1)
        engine.bind(other)
        assert not torch.equal(engine.generate([1]), before)
        engine.bind(None)
        with pytest.raises(ConfigError, match="bind"):
            engine.generate([1])
        engine.bind(small_model())
        assert torch.equal(engine.generate([1]), before)
        with pytest.raises(ConfigError, match="built for"):
            engine.bind(small_model(TEXT))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        model = fresh_model()
        engine = Engine(model, dtype=dtype)
        tokens = engine.generate([1, 2], GUIDED)
        assert engine.cache.dtype == dtype
        assert all(p.dtype == torch.float32 for p in model.parameters())
        exact = Engine(model.to(dtype)).generate([1, 2], GUIDED)
        assert torch.equal(tokens, exact)

    @pytest.mark.parametrize("kind", ["bf16", "int8"])
    def test_packed(self, kind: Any) -> None:
        engine = Engine(small_model(), weight_format=kind, backend="reference")
        tokens = engine.generate([1, 2], P(sample_logits=False), max_new_tokens=2)
        exact = Engine(small_model()).generate([1, 2], P(sample_logits=False), max_new_tokens=2)
        assert tokens.shape == exact.shape
        assert (tokens[:, 0] == exact[:, 0]).any(), "packed weights are close to the exact ones"

    def test_autocast_is_off_inside(self) -> None:
        engine = Engine(small_model())
        expected = engine.generate([1, 2], GUIDED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(engine.generate([1, 2], GUIDED), expected)

    def test_tokens_can_be_used_by_autograd(self) -> None:
        engine = Engine(small_model())
        tokens = engine.generate([1])
        table = torch.ones(CLASS.vocab_size, 3, requires_grad=True)
        torch.nn.functional.embedding(tokens, table).sum().backward()
        engine.add_request(ImageRequest(label=1))
        torch.nn.functional.embedding(_drain(engine)[0].tokens, table).sum().backward()

    def test_training_mode_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="eval"):
            Engine(fresh_model().train())


class TestCallback:
    def test_sees_every_step(self) -> None:
        seen: list[tuple[int, int, torch.Tensor]] = []
        engine = Engine(small_model(), max_images=2)
        tokens = engine.generate(
            [1, 2, 3], max_new_tokens=4, callback=lambda step, total, so_far: seen.append((step, total, so_far.clone()))
        )
        assert [(step, total) for step, total, _ in seen] == [(step, 8) for step in range(8)]
        assert torch.equal(seen[-1][2], tokens)
        for step, _, so_far in seen:
            drawn = torch.zeros(3, 4, dtype=torch.bool)
            drawn[:2, : step + 1] = True
            drawn[2:, : max(step - 3, 0)] = True
            assert torch.equal(so_far, torch.where(drawn, tokens, -1))

    @pytest.mark.parametrize("rng", ["torch", "philox"])
    def test_its_exceptions_leave_the_engine_usable(self, rng: Any) -> None:
        engine = Engine(small_model(), max_images=2)
        torch.manual_seed(0)
        expected = engine.generate([1, 2], GUIDED, rng=rng)

        def stop(step: int, total: int, tokens: torch.Tensor) -> None:
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.generate([5, 6], GUIDED, rng=rng, callback=stop)
        assert engine.num_unfinished == 0
        torch.manual_seed(0)
        assert torch.equal(engine.generate([1, 2], GUIDED, rng=rng), expected)


class TestFp8Cache:
    """An opt-in: keys and values in 8 bits, other tokens."""

    def test_takes_half_of_a_16_bit_cache(self) -> None:
        sizes = [
            StaticKVCache.nbytes(CLASS.replace(dim=256), 8, 16, dtype)
            for dtype in (torch.bfloat16, torch.float8_e4m3fn)
        ]
        assert sizes[1] / sizes[0] == pytest.approx(0.5 * (1 + 2 / 64))
        engine = Engine(small_model(), cache_dtype=torch.float8_e4m3fn)
        assert engine.cache.dtype == torch.float8_e4m3fn
        assert engine.ops.backends["decode_attention"] == "reference"
        assert engine.ops.decode_step is None

    def test_token_agreement_under_equal_noise(self) -> None:
        """Along the exact tokens: how often the draw from the next logits is the same one."""
        labels, seeds = list(range(8)), list(range(8))
        exact = Engine(small_model(), max_images=8, backend="reference").generate(labels, GUIDED, seeds=seeds)
        agreement = {}
        for name, options in (("fp8", {"cache_dtype": torch.float8_e4m3fn}), ("bf16", {"dtype": torch.bfloat16})):
            engine = Engine(small_model(), max_images=8, backend="reference", **options)  # type: ignore[arg-type]
            draw, equal = engine.ops.sample_tokens, []

            def forced(
                logits: torch.Tensor, *args: Any, draw: Any = draw, equal: Any = equal, **kw: Any
            ) -> torch.Tensor:
                drawn, wanted = draw(logits, *args, **kw), exact[:, len(equal)].long()
                equal.append((drawn == wanted).float().mean().item())
                return wanted

            object.__setattr__(engine.ops, "sample_tokens", forced)
            engine.generate(labels, GUIDED, seeds=seeds)
            assert equal[0] == 1.0 or name == "bf16", "the first token needs no cache"
            agreement[name] = sum(equal) / len(equal)
        assert 0.8 < agreement["fp8"] < 1
        assert agreement["bf16"] > 0.8

    def test_equal_tokens_in_any_company(self) -> None:
        options: dict[str, Any] = {"cache_dtype": torch.float8_e4m3fn}
        together = Engine(small_model(), max_images=3, **options).generate([1, 2, 3], GUIDED, seeds=[4, 5, 6])
        eager = Engine(small_model(), max_images=3, execution="eager", **options)
        assert torch.equal(eager.generate([1, 2, 3], GUIDED, seeds=[4, 5, 6]), together)
        assert torch.equal(eager.generate([2], GUIDED, seeds=[5])[0], together[1])

    def test_other_dtypes_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="cache holds"):
            Engine(small_model(), cache_dtype=torch.bfloat16)
        with pytest.raises(BackendUnavailableError, match="float8_e4m3fn"):
            Engine(small_model(), cache_dtype=torch.float8_e4m3fn, backend="cpu")


def test_an_interrupted_step_can_be_repeated() -> None:
    """Whatever op an interrupt hits, and in whatever step, the tokens are the same in the end."""
    expected = Engine(small_model(), max_images=2, backend="reference").generate([1, 2, 3], GUIDED, max_new_tokens=5)
    for op in ("skinny_linear", "decode_attention", "sample_tokens"):
        engine = Engine(small_model(), max_images=2, backend="reference")
        run = getattr(engine.ops, op)
        calls = 0

        def interrupted(*args: Any, run: Any = run, **kwargs: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls % 17 == 5:
                raise KeyboardInterrupt
            out: torch.Tensor = run(*args, **kwargs)
            return out

        object.__setattr__(engine.ops, op, interrupted)
        ids = [
            engine.add_request(ImageRequest(label=i, seed=i - 1, params=GUIDED, max_new_tokens=5)) for i in (1, 2, 3)
        ]
        done, interrupts = {}, 0
        while engine.num_unfinished or len(done) < 3:
            try:
                done.update({finished.request_id: finished.tokens for finished in engine.step()})
            except KeyboardInterrupt:
                interrupts += 1
        assert interrupts > 0
        assert torch.equal(torch.stack([done[i] for i in ids]), expected)


def test_numbers_that_are_not_finite_are_an_error() -> None:
    model = fresh_model()
    model.layers[1].feed_forward.w2.weight.data[3, 3] = float("nan")
    engine = Engine(model)
    with pytest.raises(NumericalError, match="not finite"):
        engine.generate([1, 2])
    model.load_state_dict(small_model().state_dict())
    assert torch.equal(engine.generate([1, 2]), Engine(small_model()).generate([1, 2]))


@pytest.mark.parametrize("broken", ["the last layer", "an unconditional row that has left", "then interrupted"])
def test_numbers_that_were_not_finite_for_a_while_are_an_error(broken: str) -> None:
    """Later logits may be finite again: the last layer's output is in no cache, and rows leave."""
    engine = Engine(small_model(), max_images=2, backend="reference")
    expected = engine.generate([1, 2], GUIDED)
    run, calls = engine.ops.skinny_linear, 0

    def overflowing(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        out: torch.Tensor = run(x, *args, **kwargs)
        if out.shape[1] == CLASS.vocab_size:
            calls += 1
            if calls == 3:
                out = out.clone()
                out[-1 if broken == "an unconditional row that has left" else 0, 5] = float("inf")
        return out

    object.__setattr__(engine.ops, "skinny_linear", overflowing)
    params = P(cfg_scale=3.0, top_k=30, cfg_interval=2)
    if broken == "then interrupted":
        engine.cache.kv[:, :, :, :, 5:] = float("nan")

        def stop(step: int, total: int, tokens: torch.Tensor) -> None:
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.generate([1, 2], params, callback=stop)
        assert bool(torch.isfinite(engine.cache.kv).all())
    else:
        with pytest.raises(NumericalError, match="not finite"):
            engine.generate([1, 2], params)
    assert torch.equal(engine.generate([1, 2], GUIDED), expected)


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "label too large": ({"condition": [10]}, "must lie in"),
    "negative label": ({"condition": torch.tensor([-1])}, "must lie in"),
    "float labels": ({"condition": torch.tensor([1.0])}, "integers"),
    "two-dimensional labels": ({"condition": torch.tensor([[1]])}, "shape"),
    "no label": ({"condition": []}, "at least one"),
    "a bool": ({"condition": [True]}, "integers"),
    "caption for a class model": ({"condition": captions()}, "labels"),
    "too many tokens": ({"max_new_tokens": 17}, "must lie in"),
    "no tokens": ({"max_new_tokens": 0}, "must lie in"),
    "settings of another batch": ({"params": [P()] * 3}, "3 sampling settings for 2"),
    "settings of another kind": ({"params": {"cfg_scale": 2.0}}, "SamplingParams"),
    "seeds of another batch": ({"seeds": [1]}, "1 seeds for 2"),
    "negative seed": ({"seeds": [1, -1]}, "seed"),
    "huge seed": ({"seeds": [1, 2**63]}, "seed"),
    "generator with philox": ({"generator": torch.Generator()}, "rng='torch'"),
    "seeds with torch": ({"rng": "torch", "seeds": [1, 2]}, "rng='philox'"),
    "unknown rng": ({"rng": "numpy"}, "rng must be"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    arguments, message = BAD_CALLS[name]
    engine = Engine(small_model())
    with pytest.raises(InvalidRequestError, match=message):
        engine.generate(**{"condition": [1, 2], **arguments})
    assert engine.num_unfinished == 0


def test_numpys_numbers_are_numbers() -> None:
    engine = Engine(small_model())
    expected = engine.generate([1, 2], P(cfg_scale=2.0, top_k=5, top_p=0.5), seeds=[3, 4], max_new_tokens=3)
    params = P(cfg_scale=np.float32(2), top_k=np.int64(5), top_p=np.float32(0.5))  # type: ignore[arg-type]
    assert params == P(cfg_scale=2.0, top_k=5, top_p=0.5)
    found = engine.generate(np.array([1, 2]), params, seeds=np.array([3, 4]), max_new_tokens=np.int64(3))  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    engine.add_request(ImageRequest(label=np.int32(1), seed=np.uint64(3), params=params, max_new_tokens=3))  # type: ignore[arg-type]
    assert torch.equal(_drain(engine)[0].tokens, expected[0])
    for labels in (np.array([1.0]), np.array([True])):
        with pytest.raises(InvalidRequestError, match="integers"):
            engine.generate(labels)  # type: ignore[arg-type]


def test_bad_captions() -> None:
    condition = captions()
    engine = Engine(small_model(TEXT))
    for bad, message in [
        (TextCondition(condition.states[:, :-1]), "do not fit"),
        (TextCondition(condition.states, condition.mask), "unconditional"),
        ([1, 2], "captions"),
    ]:
        with pytest.raises(InvalidRequestError, match=message):
            engine.generate(bad, GUIDED)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="learned"):
        Engine(small_model(NULL_TEXT)).generate(condition, GUIDED)
    with pytest.raises(InvalidRequestError, match="unconditional"):
        Engine(small_model(CLASS.replace(has_uncond_class=False))).generate([1], GUIDED)
    for arguments, message in [
        ({"states": condition.states[0]}, "B, T"),
        ({"states": condition.states, "mask": torch.ones(6, 8)}, "mask"),
        ({"states": condition.states, "uncond_states": torch.ones(7, 21)}, "uncond_states"),
        ({"states": condition.states, "uncond_mask": torch.ones(7)}, "needs uncond_states"),
        ({"states": condition.states / 0}, "not finite"),
    ]:
        with pytest.raises(InvalidRequestError, match=message):
            TextCondition(**arguments)


def test_bad_engines() -> None:
    with pytest.raises(ConfigError, match="max_images"):
        Engine(small_model(), max_images=0)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Engine(small_model(), max_new_tokens=17)
    with pytest.raises(ConfigError, match="max_images"):
        Engine(small_model(), max_images=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Engine(small_model(), max_new_tokens=4.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="int4"):
        Engine(small_model(), weight_format="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="float64"):
        Engine(small_model(), dtype=torch.float64)
    with pytest.raises(BackendUnavailableError):
        Engine(small_model(), backend="nosuch")
    with pytest.raises(BackendUnavailableError):
        Engine(small_model(), backend={"nosuch": "reference"})
    with pytest.raises(OutOfMemoryError, match=r"key/value cache .* GiB .* max_images"):
        Engine(small_model(), max_images=10**9)
    with pytest.raises(OutOfMemoryError):
        Engine(small_model(), memory_budget=10_000)


def test_generate_needs_an_idle_engine() -> None:
    engine = Engine(small_model())
    engine.add_request(ImageRequest(label=1))
    with pytest.raises(InvalidRequestError, match="in flight"):
        engine.generate([1])
    with pytest.raises(ConfigError, match="in flight"):
        engine.bind(small_model())
    engine.reset()
    engine.generate([1])
