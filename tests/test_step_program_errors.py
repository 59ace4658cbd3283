"""Interrupts, overflows and inert rows of decoding by programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gear_engine.engine import Engine
from gear_engine.errors import NumericalError, OutOfMemoryError
from gear_engine.request import ImageRequest, SamplingParams
from tests.models_for_tests import CLASS, SETTINGS, small_model

P = SamplingParams


@pytest.mark.parametrize("hit", [1, 2, 5, 6])
@pytest.mark.parametrize("op", ["sample_tokens", "decode_attention"])
def test_an_interrupted_step_can_be_repeated(op: str, hit: int) -> None:
    """Wherever an interrupt falls, the device's counter decides how far the rows are."""
    expected = Engine(small_model(), max_images=2, backend="reference").generate(
        [1, 2, 3], SETTINGS[1], max_new_tokens=7
    )
    engine = Engine(small_model(), max_images=2, backend="reference", execution="eager")
    run, calls, interrupts = getattr(engine.ops, op), 0, 0

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        out: torch.Tensor = run(*args, **kwargs)
        if calls % 7 == hit:
            raise KeyboardInterrupt
        return out

    object.__setattr__(engine.ops, op, interrupted)
    requests = [ImageRequest(label=i, seed=i - 1, params=SETTINGS[1], max_new_tokens=7) for i in (1, 2, 3)]
    ids = [engine.add_request(request) for request in requests]
    done: dict[int, torch.Tensor] = {}
    while len(done) < 3:
        try:
            done.update({finished.request_id: finished.tokens for finished in engine.step()})
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts > 0
    assert torch.equal(torch.stack([done[i] for i in ids]), expected)


def test_numbers_that_are_not_finite_are_an_error() -> None:
    engine = Engine(small_model(), max_images=2, execution="eager", backend="reference")
    expected = engine.generate([1, 2], SETTINGS[1])
    run, calls = engine.ops.skinny_linear, 0

    def overflowing(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        out: torch.Tensor = run(x, *args, **kwargs)
        calls += out.shape[1] == CLASS.vocab_size
        if calls == 3 and out.shape[1] == CLASS.vocab_size:
            out[1, 5] = float("inf")
        return out

    object.__setattr__(engine.ops, "skinny_linear", overflowing)
    with pytest.raises(NumericalError, match="not finite"):
        engine.generate([1, 2], SETTINGS[1])
    assert torch.equal(engine.generate([1, 2], SETTINGS[1]), expected)


def test_what_inert_rows_hold_is_not_seen() -> None:
    """Their logits may be anything: they are not watched, not drawn from, and written nowhere."""
    engine = Engine(small_model(), max_images=3, execution="eager", backend="reference")
    run = engine.ops.skinny_linear

    def poisoned(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = run(x, *args, **kwargs)
        if len(out) == 4:
            out[3] = float("nan")
        return out

    object.__setattr__(engine.ops, "skinny_linear", poisoned)
    params = P(cfg_scale=2.0, cfg_interval=-1)
    requests = [ImageRequest(label=1, seed=3, params=params), ImageRequest(label=2, seed=4)]
    ids = [engine.add_request(request) for request in requests]
    done: dict[int, torch.Tensor] = {}
    while engine.num_unfinished:
        done.update({finished.request_id: finished.tokens for finished in engine.step()})
    expected = Engine(small_model(), max_images=3, backend="reference").generate([1, 2], [params, P()], seeds=[3, 4])
    assert torch.equal(torch.stack([done[i] for i in ids]), expected)
    assert bool(torch.isfinite(engine.cache.kv).all())


class _Failing:
    """A launcher that warms up for real and then fails, as a capture does for which there is no memory."""

    warmups = 2

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def prepare(self, step: Any) -> Any:
        for _ in range(self.runs):
            step()
        raise torch.OutOfMemoryError("no room for the graph")


@pytest.mark.parametrize("runs", [0, 1, 2])
@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_a_failed_warm_up_leaves_the_counter_known(runs: int, rng: Any) -> None:
    """The steps that ran before the failure have moved the device's counter."""
    engine = Engine(small_model(), max_images=2, execution="eager")
    source = {"seeds": [4, 5, 6]}
    expected = engine.generate([1, 2, 3], SETTINGS[1], **source)
    steps: Any = engine._steps
    launcher, steps._launcher = steps._launcher, _Failing(runs)
    steps._programs.clear()
    with pytest.raises(OutOfMemoryError, match="no room for the graph"):
        engine.warm_up(rng)
    steps._launcher = launcher
    assert steps._launched == int(steps._buffers.counter)
    assert torch.equal(engine.generate([1, 2, 3], SETTINGS[1], **source), expected)


def test_an_interrupt_between_two_segments_can_be_repeated() -> None:
    """A rollout is one launch after another; the host can be interrupted where it looks up."""
    engine = Engine(small_model(), max_images=2, execution="eager")
    expected = engine.generate([1, 2, 3], SETTINGS[2], seeds=[4, 5, 6])
    looked: list[int] = []

    def interrupt(made: int, total: int) -> None:
        looked.append(made)
        if len(looked) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([1, 2, 3], SETTINGS[2], seeds=[4, 5, 6], progress=interrupt)
    assert 1 == looked[0] < looked[1] < CLASS.block_size
    assert engine.num_unfinished == 0
    assert torch.equal(engine.generate([1, 2, 3], SETTINGS[2], seeds=[4, 5, 6]), expected)
