"""Guidance, filters and draws against a per-row transcription of the rules, and against drawn frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from gear_engine.ops import philox
from gear_engine.ops import sample_tokens as op
from gear_engine.request import SamplingParams
from tests.ops.sampling_tables import table_of_rows

CPU = torch.device("cpu")
P = SamplingParams
MIXED = [
    P(),
    P(cfg_scale=4.0, temperature=0.9, top_k=50),
    P(cfg_scale=2.5, top_p=0.9),
    P(cfg_scale=1.75, temperature=1.1, top_k=20, top_p=0.95),
    P(sample_logits=False),
    P(cfg_scale=3.0, sample_logits=False, temperature=0.0),
    P(top_k=1),
    P(top_p=1e-6),
    P(top_k=10_000),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: threads only wait for each other, endlessly on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _table(params: list[SamplingParams], vocab_size: int, guided: list[bool] | None = None) -> op.SamplingTable:
    return op.SamplingTable.build(params, guided or [p.uses_guidance for p in params], vocab_size, CPU)


def kept_probabilities(
    cond: torch.Tensor, uncond: torch.Tensor | None, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities (V,), kept (V,)) of one image by plain loops over a sorted list."""
    logits = cond if uncond is None else uncond + (cond - uncond) * params.cfg_scale
    logits = logits / max(params.temperature, 1e-5)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if params.top_k:
        threshold = sorted(logits.tolist(), reverse=True)[min(params.top_k, len(logits)) - 1]
        kept = logits >= threshold
    if params.top_p < 1:
        order = sorted((v for v in range(len(logits)) if kept[v]), key=lambda v: -logits[v].item())
        shares = logits[order].double().softmax(0).tolist()
        total = 0.0
        for v, share in zip(order, shares, strict=True):
            if total > params.top_p:
                kept[v] = False
            total += share
    return logits.masked_fill(~kept, -math.inf).softmax(0), kept


def _rows(params: list[SamplingParams], vocab_size: int) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    cond = 3 * torch.randn(len(params), vocab_size)
    uncond = [torch.randn(vocab_size) if p.uses_guidance else None for p in params]
    return torch.cat((cond, *(u[None] for u in uncond if u is not None))), uncond


@pytest.mark.parametrize("vocab_size", [1, 7, 97, 512])
def test_every_image_by_its_own_settings(vocab_size: int) -> None:
    logits, uncond = _rows(MIXED, vocab_size)
    noise = torch.empty(len(MIXED), vocab_size).exponential_()
    tokens = op.sample_tokens(logits, _table(MIXED, vocab_size), noise=noise, backend="reference")
    for b, params in enumerate(MIXED):
        probabilities, _ = kept_probabilities(logits[b], uncond[b], params)
        scores = probabilities / noise[b] if params.sample_logits else probabilities
        assert tokens[b] == scores.argmax(), params


@pytest.mark.parametrize("params", MIXED)
def test_uniform_settings_equal_single_images(params: SamplingParams) -> None:
    logits, _ = _rows([params] * 3, 61)
    noise = torch.empty(3, 61).exponential_()
    together = op.sample_tokens(logits, _table([params] * 3, 61), noise=noise, backend="reference")
    for b in range(3):
        rows = [b, 3 + b] if params.uses_guidance else [b]
        one = op.sample_tokens(logits[rows], _table([params], 61), noise=noise[b : b + 1], backend="reference")
        assert one[0] == together[b]


def test_an_image_whose_guidance_has_ended_uses_its_conditional_row() -> None:
    params = [P(cfg_scale=4.0), P(cfg_scale=4.0, sample_logits=False)]
    logits = torch.randn(3, 19)
    table = _table(params, 19, [True, False])
    assert table.rows == 3
    tokens = op.reference(logits, table, noise=torch.ones(2, 19))
    assert tokens[0] == (logits[2] + (logits[0] - logits[2]) * 4.0).argmax()
    assert tokens[1] == logits[1].argmax()


def test_ties() -> None:
    logits = torch.zeros(1, 8)
    logits[0, [2, 5, 6]] = 1.0
    assert op.reference(logits, _table([P(sample_logits=False)], 8))[0] == 2
    assert op.reference(logits, _table([P()], 8), noise=torch.ones(1, 8))[0] == 2
    kept = op.filter_logits(logits, _table([P(top_k=2)], 8)).isfinite()
    assert kept[0].nonzero().flatten().tolist() == [2, 5, 6]


def test_top_p_keeps_the_first_token_over() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, count in [(0.4, 1), (0.6, 2), (0.79, 2), (0.9, 3), (1.0, 4)]:
        assert op.filter_logits(logits, _table([P(top_p=top_p)], 4)).isfinite().sum() == count


def test_logits_are_left_alone() -> None:
    logits, _ = _rows(MIXED, 33)
    before = logits.clone()
    op.reference(logits, _table(MIXED, 33), noise=torch.ones(len(MIXED), 33))
    assert torch.equal(logits, before)


def test_equals_multinomial() -> None:
    params = P(cfg_scale=2.0, temperature=0.8, top_k=40)
    logits, uncond = _rows([params] * 4, 97)
    probabilities = torch.stack([kept_probabilities(logits[b], uncond[b], params)[0] for b in range(4)])
    torch.manual_seed(5)
    expected = torch.multinomial(probabilities, 1)[:, 0]
    torch.manual_seed(5)
    noise = torch.empty(4, 97).exponential_(1)
    assert torch.equal(op.reference(logits, _table([params] * 4, 97), noise=noise), expected)


def test_philox_is_the_noise_of_seed_and_position() -> None:
    logits, _ = _rows(MIXED, 97)
    seeds, positions = torch.arange(len(MIXED)) * 1000003, torch.arange(len(MIXED))
    table = _table(MIXED, 97)
    noise = philox.reference(seeds, positions, 97)
    drawn = op.sample_tokens(logits, table, seeds=seeds, positions=positions, backend="reference")
    assert torch.equal(drawn, op.reference(logits, table, noise=noise))


@pytest.mark.parametrize("params", [P(), P(temperature=0.7, top_k=12), P(top_p=0.8), P(top_k=30, top_p=0.9)])
def test_drawn_frequencies(params: SamplingParams) -> None:
    """Chi-square over 10^5 draws; a filtered token is never drawn."""
    vocab_size, draws, chunk = 40, 100_000, 5_000
    logits = 1.5 * torch.randn(vocab_size)
    probabilities, kept = kept_probabilities(logits, None, params)
    table = _table([params] * chunk, vocab_size)
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for start in range(0, draws, chunk):
        seeds = torch.arange(start, start + chunk) // 64
        positions = torch.arange(start, start + chunk) % 64
        tokens = op.reference(logits.expand(chunk, -1), table, seeds=seeds, positions=positions)
        counts += tokens.bincount(minlength=vocab_size)
    assert counts.sum() == draws
    assert counts[~kept].sum() == 0
    expected = probabilities[kept].double() * draws
    assert expected.min() > 5, "the test's own distribution has cells that are too small"
    statistic = ((counts[kept] - expected) ** 2 / expected).sum().item()
    freedom = int(kept.sum()) - 1
    # Wilson-Hilferty: the 99.99% quantile of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_bad_operands() -> None:
    table = _table([P(cfg_scale=2.0)], 9)
    logits = torch.randn(2, 9)
    with pytest.raises(ValueError, match="logits must be"):
        op.sample_tokens(logits[:1], table, noise=torch.ones(1, 9))
    with pytest.raises(ValueError, match="logits must be"):
        op.sample_tokens(logits.double(), table, noise=torch.ones(1, 9))
    with pytest.raises(ValueError, match="noise"):
        op.sample_tokens(logits, table, noise=torch.ones(1, 8))
    with pytest.raises(ValueError, match="seeds"):
        op.sample_tokens(logits, table)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("noise_given", [True, False])
def test_a_table_that_the_host_does_not_know(backend: str, noise_given: bool) -> None:
    """As in a captured step: a row per row of logits, and settings on the device only. The same tokens."""
    table = _table(MIXED, 97)
    images, rows = table.images, table.rows
    for trial in range(5):
        logits, _ = _rows(MIXED, 97)
        noise = torch.empty(rows, 97).exponential_()
        sources = {"seeds": torch.arange(rows) + trial, "positions": 3 * torch.arange(rows)}
        known = {name: value[:images] for name, value in sources.items()}
        if noise_given:
            sources, known = {"noise": noise}, {"noise": noise[:images]}
        expected = op.sample_tokens(logits, table, **known, backend=backend)
        tokens = op.sample_tokens(logits, table_of_rows(table), **sources, backend=backend)
        assert torch.equal(tokens[:images], expected)
        assert not tokens[images:].any(), "rows that do not draw get token 0"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_that_do_not_draw_may_hold_anything(backend: str) -> None:
    table = table_of_rows(_table([P(), P()], 33))
    assert table.draws is not None
    table.draws[1] = False
    logits = torch.randn(2, 33)
    logits[1] = math.nan
    seeds = positions = torch.tensor([1, 2])
    tokens = op.sample_tokens(logits, table, seeds=seeds, positions=positions, backend=backend)
    assert tokens[1] == 0
    with pytest.raises(ValueError, match="seeds"):
        op.sample_tokens(logits, table, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tokens_also_go_to_a_table(backend: str) -> None:
    table = _table([P(), P(sample_logits=False)], 40)
    logits, tokens = torch.randn(2, 40), torch.full((3, 6), -1)
    seeds, positions = torch.tensor([1, 2]), torch.tensor([5, 0])
    sink = op.TokenSink(tokens, torch.tensor([1, 0]))
    drawn = op.sample_tokens(logits, table, seeds=seeds, positions=positions, sink=sink, backend=backend)
    expected = torch.full((3, 6), -1)
    expected[1, 5], expected[0, 0] = drawn[0], drawn[1]
    assert torch.equal(tokens, expected)
    with pytest.raises(ValueError, match="positions"):
        op.sample_tokens(logits, table, noise=torch.ones(2, 40), sink=sink, backend=backend)
