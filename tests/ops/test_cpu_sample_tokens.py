"""The compiled sampler: Philox bits, keep sets with ties, and the same token in any batch on any threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.ops import philox
from gear_engine.ops.backends import resolve
from gear_engine.ops.sample_tokens import SamplingTable, sample_tokens
from gear_engine.request import SamplingParams
from tests.ops.cpu_paths import forced, threads

PATHS = ("portable", "avx2", "avx512")
CPU = torch.device("cpu")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocab_size", [1, 3, 257, 1003, 16384])
def test_philox_noise_has_the_bits_of_the_reference(path: str, vocab_size: int) -> None:
    seeds = torch.cat([torch.tensor([0, 1, 2**32, 2**63 - 1]), torch.randint(0, 2**62, (30,))])
    positions = torch.cat([torch.tensor([0, 2**32 - 1]), torch.randint(0, 2**32, (32,))])
    with forced(path):
        noise = resolve("philox", CPU, torch.float32, "cpu").load()(seeds, positions, vocab_size)
    assert torch.equal(noise, philox.reference(seeds, positions, vocab_size))


def _table(params: list[SamplingParams], vocab_size: int) -> SamplingTable:
    return SamplingTable.build(params, [p.uses_guidance for p in params], vocab_size, CPU)


def _kept(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which tokens step 3 and 4 keep, token by token, with a stable sort."""
    vocab_size = logits.shape[0]
    scores = logits / max(params.temperature, 1e-5)
    kept = torch.ones(vocab_size, dtype=torch.bool)
    if params.top_k:
        kept = scores >= scores.topk(min(params.top_k, vocab_size)).values[-1]
    if params.top_p < 1:
        weights = scores.double().masked_fill(~kept, float("-inf")).softmax(0)
        in_order, order = weights.sort(descending=True, stable=True)
        before = in_order.cumsum(0) - in_order
        limit = torch.tensor(params.top_p, dtype=torch.float32).double()
        # Sums this close to the limit may round to either side.
        assert not ((before - limit).abs() < 1e-6).any(), "borderline"
        kept = torch.zeros_like(kept).scatter(0, order, before <= limit) & kept
    return kept


@settings(max_examples=80, deadline=None)
@given(
    vocab_size=st.one_of(st.integers(1, 90), st.sampled_from([255, 1000, 4099])),
    top_k=st.sampled_from([0, 1, 2, 7, 60, 5000]),
    top_p=st.sampled_from([1.0, 0.93713, 0.513, 0.0717, 1e-4]),
    temperature=st.sampled_from([1.0, 0.37, 3.0]),
    ties=st.booleans(),
    path=st.sampled_from(PATHS),
    seed=st.integers(0, 10**6),
)
def test_draws_only_and_all_of_the_kept_tokens(
    vocab_size: int, top_k: int, top_p: float, temperature: float, ties: bool, path: str, seed: int
) -> None:
    """Noise that favours one token after the other shows which can be drawn."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab_size, generator=rng) * 2
    if ties:
        logits = logits.round()
    params = SamplingParams(top_k=top_k, top_p=top_p, temperature=temperature)
    try:
        kept = _kept(logits, params)
    except AssertionError:
        return
    tokens = torch.randperm(vocab_size, generator=rng)[:40]
    noise = torch.ones(len(tokens), vocab_size)
    noise[torch.arange(len(tokens)), tokens] = 1e-30
    table = _table([params] * len(tokens), vocab_size)
    with forced(path):
        drawn = sample_tokens(logits.expand(len(tokens), -1), table, noise=noise, backend="cpu")
    assert torch.equal(drawn == tokens, kept[tokens])
    assert kept[drawn].all()


@pytest.mark.parametrize("path", PATHS)
def test_agrees_with_the_reference_on_mixed_settings(path: str) -> None:
    params = [
        SamplingParams(cfg_scale=4.0),
        SamplingParams(cfg_scale=1.7, top_k=50, temperature=0.8),
        SamplingParams(top_p=0.9),
        SamplingParams(sample_logits=False, cfg_scale=2.0),
        SamplingParams(top_k=300, top_p=0.5),
    ]
    table = _table(params, 1003)
    different = 0
    with forced(path):
        for _ in range(40):
            logits, noise = torch.randn(table.rows, 1003) * 2, torch.empty(5, 1003).exponential_(1)
            found = sample_tokens(logits, table, noise=noise, backend="cpu")
            different += int((found != sample_tokens(logits, table, noise=noise, backend="reference")).sum())
    assert different <= 1  # exponentials differ in their last bits


@pytest.mark.parametrize("path", PATHS)
def test_an_image_draws_the_same_token_in_any_batch_on_any_threads(path: str) -> None:
    vocab_size, images = 2051, 17
    params = [SamplingParams(top_k=100 * (i % 3), top_p=1.0 if i % 2 else 0.8, cfg_scale=3.0) for i in range(images)]
    logits = torch.randn(2, images, vocab_size) * 2
    seeds, positions = torch.randint(0, 2**62, (images,)), torch.randint(0, 256, (images,))

    def draw(order: list[int]) -> torch.Tensor:
        table = _table([params[i] for i in order], vocab_size)
        return sample_tokens(
            logits[:, order].flatten(0, 1), table, seeds=seeds[order], positions=positions[order], backend="cpu"
        )

    with forced(path):
        with threads(1):
            alone = torch.cat([draw([image]) for image in range(images)])
        for count in (1, 2, 5):
            with threads(count):
                for batch in (3, 8, 17):
                    order = torch.randperm(images)[:batch].tolist()
                    assert torch.equal(draw(order), alone[order])


def test_drawn_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    count = 20000
    table = _table([SamplingParams()] * count, 4)
    drawn = sample_tokens(
        probabilities.log().expand(count, -1), table, seeds=torch.arange(count), positions=torch.zeros(count).long(),
        backend="cpu",
    )  # fmt: skip
    observed = torch.bincount(drawn, minlength=4) / count
    assert (observed - probabilities).abs().max() < 4 * (0.25 / count) ** 0.5
