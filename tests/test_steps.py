"""An engine that makes several steps per call, against one that makes them one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gear_engine import steps as steps_module
from gear_engine.engine import Engine
from gear_engine.errors import NumericalError
from gear_engine.ops import native, torch_exponential
from gear_engine.request import ImageRequest, SamplingParams
from tests.models_for_tests import CLASS, TEXT, captions, fresh_model, small_model
from tests.ops.cpu_paths import threads

pytestmark = pytest.mark.skipif(native.unavailable("decode_steps_cpu") is not None, reason="needs the compiled module")

P = SamplingParams
SETTINGS = [
    P(),
    P(cfg_scale=4.0, temperature=0.9, top_k=20),
    P(cfg_scale=2.5, cfg_interval=5, top_p=0.9),
    P(sample_logits=False),
    P(cfg_scale=2.0, cfg_interval=0),
]
FORMATS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "weight_format": "int8"},
    {"dtype": torch.bfloat16, "cache_dtype": "fp8"},
]


def _one_at_a_time(**options: Any) -> Engine:
    engine = Engine(small_model(), **options)
    object.__setattr__(engine.ops, "decode_steps", None)
    return engine


def _spied(engine: Engine, interrupt_at: int = -1) -> list[int]:
    """Steps made by every call from now on; the call number ``interrupt_at`` is interrupted at its end."""
    made: list[int] = []
    run = engine.ops.decode_steps
    assert run is not None

    def spy(*args: Any, **kwargs: Any) -> tuple[int, bool]:
        out: tuple[int, bool] = run(*args, **kwargs)
        made.append(out[0])
        if len(made) - 1 == interrupt_at:
            raise KeyboardInterrupt
        return out

    object.__setattr__(engine.ops, "decode_steps", spy)
    return made


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", FORMATS)
def test_equal_tokens(options: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance that ends at other steps, images that wait for a slot; in one call for all alike steps, or in many."""
    arguments: dict[str, Any] = {"condition": [3, 1, 4, 1, 5], "params": SETTINGS, "seeds": [2, 7, 1, 8, 2**50]}
    with threads(count):
        expected = _one_at_a_time(max_images=3, **options).generate(**arguments)
        engine = Engine(small_model(), max_images=3, **options)
        monkeypatch.setattr(steps_module, "CALL_SECONDS", 1e9)
        made = _spied(engine)
        assert torch.equal(engine.generate(**arguments), expected)
        # After token 0, rows leave when guidance ends: behind token 6 of the third image, token 1 of the last.
        assert made == [6, 9, 1, 14]
        monkeypatch.setattr(steps_module, "CALL_SECONDS", 0.0)
        made.clear()
        assert torch.equal(engine.generate(**arguments), expected)
        assert set(made) == {1}


@pytest.mark.parametrize("options", FORMATS)
def test_images_that_join_and_leave(options: dict[str, Any]) -> None:
    """Different positions side by side, up to three steps at a time."""
    engines = [_one_at_a_time(max_images=3, **options), Engine(small_model(), max_images=3, **options)]
    lengths, found = [16, 5, 1, 12, 9, 2], []
    for engine in engines:
        done: dict[int, torch.Tensor] = {}
        for i, length in enumerate(lengths):
            engine.add_request(ImageRequest(label=i, seed=i, params=SETTINGS[i % 5], max_new_tokens=length))
            done.update({each.request_id: each.tokens for each in engine._step(None, 3)})
        while engine.num_unfinished:
            done.update({each.request_id: each.tokens for each in engine._step(None, 3)})
        found.append(done)
    assert [len(found[1][i]) for i in range(6)] == lengths
    assert all(torch.equal(found[0][i], found[1][i]) for i in range(6))


def test_captions() -> None:
    engine = Engine(small_model(TEXT), max_images=6)
    found = engine.generate(captions(), SETTINGS[1])
    object.__setattr__(engine.ops, "decode_steps", None)
    assert torch.equal(engine.generate(captions(), SETTINGS[1]), found)


@pytest.mark.parametrize("options", FORMATS)
def test_torchs_draws(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and generator of single steps; guidance that ends at other steps, one image of argmaxes, one call for all
    alike steps."""
    monkeypatch.setattr(steps_module, "CALL_SECONDS", 1e9)
    found = []
    for engine in (_one_at_a_time(max_images=5, **options), Engine(small_model(), max_images=5, **options)):
        made = _spied(engine) if engine.ops.decode_steps is not None else []
        source = torch.Generator().manual_seed(9)
        tokens = engine.generate([3, 1, 4, 1, 5], SETTINGS, rng="torch", generator=source)
        found.append((tokens, source.get_state()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert len(made) < 6
    assert sum(made) == 15


def test_torchs_draws_where_torch_draws_in_another_way() -> None:
    """An engine whose kernel would draw other numbers makes single steps."""
    engine = Engine(small_model(), max_images=2)
    expected = engine.generate([1, 2], SETTINGS[1], rng="torch", generator=torch.Generator().manual_seed(1))
    engine = Engine(small_model(), max_images=2, backend={"torch_exponential": "reference"})
    assert engine.ops.torch_exponential is torch_exponential.reference
    made = _spied(engine)
    found = engine.generate([1, 2], SETTINGS[1], rng="torch", generator=torch.Generator().manual_seed(1))
    assert made == []
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize("several", [True, False])
def test_torchs_default_dtype_does_not_matter(rng: Any, several: bool) -> None:
    def tokens() -> torch.Tensor:
        torch.manual_seed(1)
        return engine.generate([1, 2], SETTINGS[1], rng=rng)

    engine = Engine(small_model(), max_images=2) if several else _one_at_a_time(max_images=2)
    expected = tokens()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(tokens(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_callback_sees_single_steps() -> None:
    engine = Engine(small_model(), max_images=2)
    made, seen = _spied(engine), []
    engine.generate([1, 2], SETTINGS[1], callback=lambda step, total, tokens: seen.append(step))
    assert made == [1] * 15
    assert seen == list(range(16))


def test_an_interrupt_between_calls_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "CALL_SECONDS", 1e9)
    expected = _one_at_a_time(max_images=2).generate([1, 2], SETTINGS[2], seeds=[3, 4])
    engine = Engine(small_model(), max_images=2)
    ids = [engine.add_request(ImageRequest(label=i, seed=i + 2, params=SETTINGS[2])) for i in (1, 2)]
    _spied(engine, interrupt_at=1)
    done: dict[int, torch.Tensor] = {}
    interrupts = 0
    while engine.num_unfinished:
        try:
            done.update({each.request_id: each.tokens for each in engine._step(None, 4)})
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    assert torch.equal(torch.stack([done[i] for i in ids]), expected)
    _spied(engine, interrupt_at=0)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([1, 2], SETTINGS[2], seeds=[3, 4])
    assert torch.equal(engine.generate([1, 2], SETTINGS[2], seeds=[3, 4]), expected)


def test_numbers_that_are_not_finite_are_an_error() -> None:
    model = fresh_model()
    model.layers[1].feed_forward.w2.weight.data[3, 3] = float("nan")
    engine = Engine(model, max_images=2)
    made = _spied(engine)
    with pytest.raises(NumericalError, match="not finite"):
        engine.generate([1, 2])
    assert sum(made) == CLASS.block_size - 1, "noticed at the end of the image"
    model.load_state_dict(small_model().state_dict())
    assert torch.equal(engine.generate([1, 2]), Engine(small_model(), max_images=2).generate([1, 2]))
