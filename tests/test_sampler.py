"""The sources of randomness."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gear_engine.ops import GeneratorOps
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams
from gear_engine.sampler import PhiloxNoise, TorchNoise

CPU = torch.device("cpu")
P = SamplingParams


def _table(*params: SamplingParams) -> SamplingTable:
    return SamplingTable.build(params, [False] * len(params), 23, CPU)


def _ops() -> GeneratorOps:
    return GeneratorOps.resolve(CPU, torch.float32, "reference")


def test_torch_noise_is_the_stream_of_multinomial() -> None:
    logits = torch.randn(3, 23)
    noise = TorchNoise(None)
    torch.manual_seed(8)
    drawn = [noise.sample(_ops(), logits, _table(P(), P(), P()), torch.zeros(3)) for _ in range(4)]
    torch.manual_seed(8)
    expected = [torch.multinomial(logits.softmax(-1), 1)[:, 0] for _ in range(4)]
    assert torch.equal(torch.stack(drawn), torch.stack(expected))


def test_torch_noise_draws_for_the_batch_if_any_image_draws() -> None:
    logits, greedy = torch.randn(2, 23), P(sample_logits=False)
    torch.manual_seed(1)
    tokens = TorchNoise(None).sample(_ops(), logits, _table(greedy, P()), torch.zeros(2))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.empty(2, 23).exponential_(1)
    assert torch.equal(torch.get_rng_state(), after)
    assert tokens[0] == logits[0].argmax()


def test_torch_noise_draws_nothing_for_argmaxes() -> None:
    logits, greedy = torch.randn(2, 23), P(sample_logits=False)
    before = torch.get_rng_state()
    TorchNoise(None).sample(_ops(), logits, _table(greedy, greedy), torch.zeros(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_philox_noise_hands_on_seeds_and_positions() -> None:
    seen: dict[str, Any] = {}

    def spy(logits: torch.Tensor, table: SamplingTable, **kwargs: Any) -> torch.Tensor:
        seen.update(kwargs)
        return torch.zeros(2, dtype=torch.int64)

    positions = torch.tensor([3, 9])
    noise = PhiloxNoise([5, 2**63 - 1], CPU)
    noise.sample(replace(_ops(), sample_tokens=spy), torch.randn(2, 23), _table(P(), P()), positions)
    assert seen["seeds"].tolist() == [5, 2**63 - 1]
    assert seen["positions"] is positions
    assert seen.get("noise") is None
