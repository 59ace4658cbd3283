"""The noise of ``rng="torch"`` is torch's stream, however an engine draws it, and an engine leaves no draw behind."""

from __future__ import annotations

import pytest
import torch

from gear_engine.ops import GeneratorOps
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams
from gear_engine.sampler import TorchNoise

CPU = torch.device("cpu")
POSITIONS = torch.zeros(3, dtype=torch.int64)


def _table(sample_logits: bool = True) -> SamplingTable:
    return SamplingTable.build([SamplingParams(sample_logits=sample_logits)] * 3, [False] * 3, 50, CPU)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_draws_are_those_of_a_plain_loop(backend: str, own: bool) -> None:
    ops = GeneratorOps.resolve(CPU, torch.float32, backend)
    source = torch.Generator() if own else torch.default_generator
    logits = torch.randn(4, 3, 50)
    source.manual_seed(3)
    expected = [(row.softmax(-1) / torch.empty(3, 50).exponential_(1, generator=source)).argmax(-1) for row in logits]
    state = source.get_state()
    source.manual_seed(3)
    noise = TorchNoise(source if own else None)
    for row, tokens in zip(logits, expected, strict=True):
        assert torch.equal(noise.sample(ops, row, _table(), POSITIONS), tokens)
    assert torch.equal(source.get_state(), state)


def test_a_captured_steps_noise() -> None:
    ops = GeneratorOps.resolve(CPU, torch.float32)
    sources = [torch.Generator().manual_seed(3) for _ in range(2)]
    out = torch.full((4, 50), 7.0)
    TorchNoise(sources[0]).fill(ops, out[:3], [SamplingParams(sample_logits=False), *[SamplingParams()] * 2])
    assert torch.equal(out[:3], torch.empty(3, 50).exponential_(1, generator=sources[1]))
    assert bool((out[3] == 7.0).all())
    assert torch.equal(sources[0].get_state(), sources[1].get_state())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_argmax_draws_nothing(backend: str) -> None:
    ops = GeneratorOps.resolve(CPU, torch.float32, backend)
    source = torch.Generator().manual_seed(3)
    state = source.get_state()
    noise = TorchNoise(source)
    noise.sample(ops, torch.randn(3, 50), _table(False), POSITIONS)
    noise.fill(ops, torch.empty(3, 50), [SamplingParams(sample_logits=False)] * 3)
    assert torch.equal(source.get_state(), state)
