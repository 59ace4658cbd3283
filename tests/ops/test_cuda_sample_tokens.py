"""The CUDA sampler, emulated on the CPU: the tokens of the compiled CPU kernel, for any settings and vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gear_engine.ops.sample_tokens import SamplingTable, TokenSink, sample_tokens
from gear_engine.request import SamplingParams

CPU = torch.device("cpu")
Run = Callable[..., torch.Tensor]

SETTINGS = [
    SamplingParams(cfg_scale=4.0, temperature=0.9, top_k=50),
    SamplingParams(cfg_scale=1.5, top_p=0.9),
    SamplingParams(top_k=200, top_p=0.95, temperature=1.1),
    SamplingParams(sample_logits=False, cfg_scale=2.0),
    SamplingParams(),
    SamplingParams(top_k=1),
    SamplingParams(top_p=1e-4),
    SamplingParams(top_k=7, top_p=0.3),
]


@pytest.fixture
def run(emulated: Callable[[str], Callable[..., Any]]) -> Run:
    return emulated("sample_tokens")


def _table(params: list[SamplingParams], vocab_size: int) -> SamplingTable:
    return SamplingTable.build(params, [p.uses_guidance for p in params], vocab_size, CPU)


@pytest.mark.parametrize("vocab_size", [1, 3, 500, 1003])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rng", ["philox", "noise"])
def test_draws_what_the_cpu_kernel_draws(run: Run, vocab_size: int, ties: bool, rng: str) -> None:
    table = _table(SETTINGS, vocab_size)
    images = len(SETTINGS)
    seeds, positions = torch.randint(0, 2**62, (images,)), torch.randint(0, 1024, (images,))
    source = (
        {"seeds": seeds, "positions": positions}
        if rng == "philox"
        else {"noise": torch.empty(images, vocab_size).exponential_(1)}
    )
    logits = 2 * torch.randn(table.rows, vocab_size)
    if ties:
        logits = logits.round()
    expected = sample_tokens(logits, table, **source, backend="cpu")  # type: ignore[arg-type]
    assert torch.equal(run(logits, table, **source), expected)


def test_a_vocabulary_beyond_the_registers(run: Run) -> None:
    vocab_size = 16387
    table = _table([SamplingParams(cfg_scale=1.5, top_k=3000)], vocab_size)
    logits = torch.randn(table.rows, vocab_size).round(decimals=1)
    seeds, positions = torch.tensor([5]), torch.tensor([9])
    expected = sample_tokens(logits, table, seeds=seeds, positions=positions, backend="cpu")
    assert torch.equal(run(logits, table, seeds=seeds, positions=positions), expected)


def test_a_vocabulary_that_needs_more_shared_memory_than_the_default_with_the_static_part(run: Run) -> None:
    vocab_size = 12100  # 48400 bytes of weights; with the block's sums more than 48 KiB
    table = _table([SamplingParams(sample_logits=False)], vocab_size)
    logits = torch.randn(1, vocab_size)
    assert run(logits, table).item() == logits.argmax()


def test_tokens_go_to_the_token_table(run: Run) -> None:
    params = [SamplingParams(), SamplingParams(sample_logits=False), SamplingParams()]
    built = _table(params, 40)
    table = SamplingTable(**{**vars(built), "draws": torch.tensor([True, True, False])})
    logits, tokens = torch.randn(3, 40), torch.full((3, 6), -1)
    seeds, positions, slots = torch.tensor([1, 2, 3]), torch.tensor([5, 0, 2]), torch.tensor([2, 0, -1])
    drawn = run(logits, table, seeds=seeds, positions=positions, sink=TokenSink(tokens, slots))
    assert drawn[2] == 0
    expected = torch.full((3, 6), -1)
    expected[2, 5], expected[0, 0] = drawn[0], drawn[1]
    assert torch.equal(tokens, expected)
    assert torch.equal(drawn, sample_tokens(logits, table, seeds=seeds, positions=positions, backend="cpu"))


def test_an_image_draws_the_same_token_in_any_batch(run: Run) -> None:
    params = [p for p in SETTINGS if not p.uses_guidance]
    images = len(params)
    logits = 2 * torch.randn(images, 300)
    seeds, positions = torch.randint(0, 2**62, (images,)), torch.randint(0, 256, (images,))
    together = run(logits, _table(params, 300), seeds=seeds, positions=positions)
    for i in range(images):
        one = slice(i, i + 1)
        alone = run(logits[one], _table(params[one], 300), seeds=seeds[one], positions=positions[one])
        assert torch.equal(alone, together[one])
