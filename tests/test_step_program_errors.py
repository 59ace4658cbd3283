"""Interrupts, overflows and inert rows of decoding by programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gear_engine.engine import Engine
from gear_engine.errors import NumericalError
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
