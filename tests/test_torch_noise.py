"""Draws that run beside the model's step come from the same stream, in the same order, and none is made in advance."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from gear_engine.engine import Engine
from gear_engine.ops import GeneratorOps
from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams
from gear_engine.sampler import TorchNoise
from tests.models_for_tests import small_model

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


def test_no_draw_is_under_way_after_a_failed_step() -> None:
    """Whoever catches the error may seed the generator again: no thread draws from it behind their back."""
    engine = Engine(small_model(), max_images=2, backend="reference")
    begun, free = threading.Event(), threading.Event()
    draw = TorchNoise._draw

    def slow(self: TorchNoise, *args: Any) -> torch.Tensor:
        begun.set()
        free.wait(0.3)
        return draw(self, *args)

    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        begun.wait(10)
        raise KeyboardInterrupt

    source = torch.Generator().manual_seed(3)
    object.__setattr__(engine.ops, "skinny_linear", fail)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TorchNoise, "_draw", slow)
        engine.generate([1, 2], rng="torch", generator=source)
    state = source.get_state()
    free.set()
    time.sleep(0.05)
    assert torch.equal(source.get_state(), state)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gear_engine-noise")]
