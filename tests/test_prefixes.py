"""Null captions that are shared, and those that only look alike."""

from __future__ import annotations

import torch

from gear_engine.engine import Engine
from gear_engine.prefixes import Caption, PrefixEncoder
from gear_engine.runner import PrefixState
from tests.golden_weights import golden_noise
from tests.models_for_tests import NULL_TEXT, TEXT, small_model


def encode(engine: Engine, captions: list[Caption]) -> PrefixState:
    with torch.no_grad():
        return PrefixEncoder().captions(engine.weights, engine.ops, captions, [True] * len(captions))


def same(found: PrefixState, expected: PrefixState) -> bool:
    pairs = zip(vars(found).values(), vars(expected).values(), strict=True)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs if isinstance(a, torch.Tensor))


def test_two_views_that_begin_at_the_same_byte_are_two_masks() -> None:
    """The first T flags of a buffer, and every second one: a learned null caption takes the caption's mask."""
    engine = Engine(small_model(NULL_TEXT), backend="reference")
    length = NULL_TEXT.cls_token_num
    buffer = torch.arange(2 * length) % 2 == 0
    states = golden_noise("captions", (length, NULL_TEXT.caption_dim))
    near, far = Caption(states, buffer[:length], None), Caption(states, buffer[::2], None)
    assert near.mask is not None and far.mask is not None
    assert near.mask.sum() != far.mask.sum()
    both = encode(engine, [near, far])
    for index, caption in enumerate((near, far)):
        alone = encode(engine, [caption])
        assert same(both.select(2 + index), alone.select(1))


def test_two_null_captions_that_begin_at_the_same_byte() -> None:
    engine = Engine(small_model(TEXT), backend="reference")
    length, width = TEXT.cls_token_num, TEXT.caption_dim
    buffer = golden_noise("null", (2 * length, width))
    states = golden_noise("captions", (length, width))
    captions = [Caption(states, None, (null, None)) for null in (buffer[:length], buffer[::2])]
    both = encode(engine, captions)
    for index, caption in enumerate(captions):
        assert same(both.select(2 + index), encode(engine, [caption]).select(1))
