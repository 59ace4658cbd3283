"""Draws that run beside the model's step come from the same stream, in the same order, and none is made in advance."""

from __future__ import annotations

import pytest
import torch

from gear_engine.ops import GeneratorOps
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams
from gear_engine.sampler import TorchNoise

CPU = torch.device("cpu")
OPS = GeneratorOps.resolve(CPU, torch.float32, "reference")


def _table(sample_logits: bool = True) -> SamplingTable:
    return SamplingTable.build([SamplingParams(sample_logits=sample_logits)] * 3, [False] * 3, 50, CPU)


@pytest.mark.parametrize("own", [True, False])
def test_begun_draws_are_those_of_a_plain_loop(own: bool) -> None:
    def generator() -> torch.Generator:
        return (torch.Generator() if own else torch.default_generator).manual_seed(3)

    logits = torch.randn(4, 3, 50)
    source = generator()
    expected = [(row.softmax(-1) / torch.empty(3, 50).exponential_(1, generator=source)).argmax(-1) for row in logits]
    state = source.get_state()

    source = generator()
    noise = TorchNoise(source if own else None)
    positions = torch.zeros(3, dtype=torch.int64)
    for step, row in enumerate(logits):
        if step != 2:  # a step that was not announced draws when it samples
            noise.begin(_table(), 50, CPU)
            noise.begin(_table(), 50, CPU)  # announced twice, drawn once
        assert torch.equal(noise.sample(OPS, row, _table(), positions), expected[step])
    assert torch.equal(source.get_state(), state)


def test_argmax_draws_nothing() -> None:
    source = torch.Generator().manual_seed(3)
    state = source.get_state()
    noise = TorchNoise(source)
    noise.begin(_table(False), 50, CPU)
    noise.sample(OPS, torch.randn(3, 50), _table(False), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(source.get_state(), state)
