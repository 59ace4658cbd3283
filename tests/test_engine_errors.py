"""Requests and models that the engine refuses, interrupts and overflows: it stays usable after each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gear_engine.engine import Engine
from gear_engine.errors import (
    BackendUnavailableError,
    ConfigError,
    InvalidRequestError,
    NumericalError,
    OutOfMemoryError,
)
from gear_engine.models.condition import TextCondition
from gear_engine.request import ImageRequest, SamplingParams
from tests.models_for_tests import CLASS, GUIDED, NULL_TEXT, TEXT, captions, fresh_model, small_model

P = SamplingParams


def test_an_interrupted_step_can_be_repeated() -> None:
    """Whatever op an interrupt hits, and in whatever step, the tokens are the same in the end."""
    expected = Engine(small_model(), max_images=2, backend="reference").generate([1, 2, 3], GUIDED, max_new_tokens=5)
    for op in ("skinny_linear", "decode_attention", "sample_tokens"):
        engine = Engine(small_model(), max_images=2, backend="reference")
        run = getattr(engine.ops, op)
        calls = 0

        def interrupted(*args: Any, run: Any = run, **kwargs: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls % 17 == 5:
                raise KeyboardInterrupt
            out: torch.Tensor = run(*args, **kwargs)
            return out

        object.__setattr__(engine.ops, op, interrupted)
        ids = [
            engine.add_request(ImageRequest(label=i, seed=i - 1, params=GUIDED, max_new_tokens=5)) for i in (1, 2, 3)
        ]
        done, interrupts = {}, 0
        while engine.num_unfinished or len(done) < 3:
            try:
                done.update({finished.request_id: finished.tokens for finished in engine.step()})
            except KeyboardInterrupt:
                interrupts += 1
        assert interrupts > 0
        assert torch.equal(torch.stack([done[i] for i in ids]), expected)


def test_numbers_that_are_not_finite_are_an_error() -> None:
    model = fresh_model()
    model.layers[1].feed_forward.w2.weight.data[3, 3] = float("nan")
    engine = Engine(model)
    with pytest.raises(NumericalError, match="not finite"):
        engine.generate([1, 2])
    model.load_state_dict(small_model().state_dict())
    assert torch.equal(engine.generate([1, 2]), Engine(small_model()).generate([1, 2]))


@pytest.mark.parametrize("broken", ["the last layer", "an unconditional row that has left", "then interrupted"])
def test_numbers_that_were_not_finite_for_a_while_are_an_error(broken: str) -> None:
    """Later logits may be finite again: the last layer's output is in no cache, and rows leave."""
    engine = Engine(small_model(), max_images=2, backend="reference")
    expected = engine.generate([1, 2], GUIDED)
    run, calls = engine.ops.skinny_linear, 0

    def overflowing(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        out: torch.Tensor = run(x, *args, **kwargs)
        if out.shape[1] == CLASS.vocab_size:
            calls += 1
            if calls == 3:
                out = out.clone()
                out[-1 if broken == "an unconditional row that has left" else 0, 5] = float("inf")
        return out

    object.__setattr__(engine.ops, "skinny_linear", overflowing)
    params = P(cfg_scale=3.0, top_k=30, cfg_interval=2)
    if broken == "then interrupted":
        engine.cache.kv[:, :, :, :, 5:] = float("nan")

        def stop(step: int, total: int, tokens: torch.Tensor) -> None:
            if step == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.generate([1, 2], params, callback=stop)
        assert bool(torch.isfinite(engine.cache.kv).all())
    else:
        with pytest.raises(NumericalError, match="not finite"):
            engine.generate([1, 2], params)
    assert torch.equal(engine.generate([1, 2], GUIDED), expected)


#: Stands for a generator that a build without CUDA cannot make.
ON_CUDA = SimpleNamespace(device=torch.device("cuda:0"))
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "label too large": ({"condition": [10]}, "must lie in"),
    "negative label": ({"condition": torch.tensor([-1])}, "must lie in"),
    "float labels": ({"condition": torch.tensor([1.0])}, "integers"),
    "two-dimensional labels": ({"condition": torch.tensor([[1]])}, "shape"),
    "no label": ({"condition": []}, "at least one"),
    "a bool": ({"condition": [True]}, "integers"),
    "caption for a class model": ({"condition": captions()}, "labels"),
    "too many tokens": ({"max_new_tokens": 17}, "must lie in"),
    "no tokens": ({"max_new_tokens": 0}, "must lie in"),
    "settings of another batch": ({"params": [P()] * 3}, "3 sampling settings for 2"),
    "settings of another kind": ({"params": {"cfg_scale": 2.0}}, "SamplingParams"),
    "seeds of another batch": ({"seeds": [1]}, "1 seeds for 2"),
    "negative seed": ({"seeds": [1, -1]}, "seed"),
    "huge seed": ({"seeds": [1, 2**63]}, "seed"),
    "a generator of another device": ({"rng": "torch", "generator": ON_CUDA}, "draws on cuda, the engine on cpu"),
    "generator with philox": ({"generator": torch.Generator()}, "rng='torch'"),
    "seeds with torch": ({"rng": "torch", "seeds": [1, 2]}, "rng='philox'"),
    "unknown rng": ({"rng": "numpy"}, "rng must be"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    arguments, message = BAD_CALLS[name]
    engine = Engine(small_model())
    with pytest.raises(InvalidRequestError, match=message):
        engine.generate(**{"condition": [1, 2], **arguments})
    assert engine.num_unfinished == 0


def test_bad_captions() -> None:
    condition = captions()
    engine = Engine(small_model(TEXT))
    for bad, message in [
        (TextCondition(condition.states[:, :-1]), "do not fit"),
        (TextCondition(condition.states, condition.mask), "unconditional"),
        ([1, 2], "captions"),
    ]:
        with pytest.raises(InvalidRequestError, match=message):
            engine.generate(bad, GUIDED)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="learned"):
        Engine(small_model(NULL_TEXT)).generate(condition, GUIDED)
    with pytest.raises(InvalidRequestError, match="unconditional"):
        Engine(small_model(CLASS.replace(has_uncond_class=False))).generate([1], GUIDED)
    for arguments, message in [
        ({"states": condition.states[0]}, "B, T"),
        ({"states": condition.states, "mask": torch.ones(6, 8)}, "mask"),
        ({"states": condition.states, "uncond_states": torch.ones(7, 21)}, "uncond_states"),
        ({"states": condition.states, "uncond_mask": torch.ones(7)}, "needs uncond_states"),
        ({"states": condition.states / 0}, "not finite"),
    ]:
        with pytest.raises(InvalidRequestError, match=message):
            TextCondition(**arguments)


def test_bad_engines() -> None:
    with pytest.raises(ConfigError, match="max_images"):
        Engine(small_model(), max_images=0)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Engine(small_model(), max_new_tokens=17)
    with pytest.raises(ConfigError, match="max_images"):
        Engine(small_model(), max_images=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Engine(small_model(), max_new_tokens=4.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="int4"):
        Engine(small_model(), weight_format="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="float64"):
        Engine(small_model(), dtype=torch.float64)
    with pytest.raises(BackendUnavailableError):
        Engine(small_model(), backend="nosuch")
    with pytest.raises(BackendUnavailableError):
        Engine(small_model(), backend={"nosuch": "reference"})
    with pytest.raises(OutOfMemoryError, match=r"key/value cache .* GiB .* max_images"):
        Engine(small_model(), max_images=10**9)
    with pytest.raises(OutOfMemoryError):
        Engine(small_model(), memory_budget=10_000)


def test_generate_needs_an_idle_engine() -> None:
    engine = Engine(small_model())
    engine.add_request(ImageRequest(label=1))
    with pytest.raises(InvalidRequestError, match="in flight"):
        engine.generate([1])
    with pytest.raises(ConfigError, match="in flight"):
        engine.bind(small_model())
    engine.reset()
    engine.generate([1])
