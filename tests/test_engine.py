"""The engine: draws that do not depend on company, requests that come and go, what its callback sees."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from gear_engine.engine import Engine
from gear_engine.errors import InvalidRequestError
from gear_engine.models.condition import TextCondition
from gear_engine.request import ImageRequest, SamplingParams
from tests.models_for_tests import CLASS, GUIDED, SETTINGS, TEXT, captions, drain, small_model
from tests.token_ties import count_ties, philox_scores

P = SamplingParams


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
            assert torch.equal(drain(engine)[0].tokens, together[i])


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


def test_numpys_numbers_are_numbers() -> None:
    engine = Engine(small_model())
    expected = engine.generate([1, 2], P(cfg_scale=2.0, top_k=5, top_p=0.5), seeds=[3, 4], max_new_tokens=3)
    params = P(cfg_scale=np.float32(2), top_k=np.int64(5), top_p=np.float32(0.5))  # type: ignore[arg-type]
    assert params == P(cfg_scale=2.0, top_k=5, top_p=0.5)
    found = engine.generate(np.array([1, 2]), params, seeds=np.array([3, 4]), max_new_tokens=np.int64(3))  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    engine.add_request(ImageRequest(label=np.int32(1), seed=np.uint64(3), params=params, max_new_tokens=3))  # type: ignore[arg-type]
    assert torch.equal(drain(engine)[0].tokens, expected[0])
    for labels in (np.array([1.0]), np.array([True])):
        with pytest.raises(InvalidRequestError, match="integers"):
            engine.generate(labels)  # type: ignore[arg-type]
