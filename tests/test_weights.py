"""Weights that are converted one after another."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch

from gear_engine.config import GeneratorConfig
from gear_engine.errors import CheckpointError
from gear_engine.models.weights import GeneratorWeights, expected_shapes
from gear_engine.ops.skinny_linear import PackedWeight, PackKind, Weight

CONFIG = GeneratorConfig(dim=72, n_layer=2, n_head=2, vocab_size=1100, block_size=16, num_classes=5)


def _state() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng) for name, shape in expected_shapes(CONFIG).items()}


def _numbers(weight: Weight | None) -> list[torch.Tensor]:
    if isinstance(weight, PackedWeight):
        return [weight.data, *([] if weight.scales is None else [weight.scales])]
    return [] if weight is None else [weight]


@pytest.mark.parametrize(
    ("dtype", "kind"), [(None, None), (torch.bfloat16, None), (torch.bfloat16, "bf16"), (torch.float32, "int8")]
)
def test_streamed_weights_are_the_converted_ones(dtype: torch.dtype | None, kind: PackKind | None) -> None:
    state = _state()
    expected = GeneratorWeights.from_state_dict(CONFIG, state).to(None, dtype, kind)
    alive: list[weakref.ref[torch.Tensor]] = []

    def tensor(name: str) -> torch.Tensor:
        # Nothing but what is shared (the same dtype, not packed) keeps an original.
        if dtype is torch.bfloat16:
            assert all(ref() is None for ref in alive)
        copy = state[name].clone()
        alive.append(weakref.ref(copy))
        return copy

    streamed = GeneratorWeights.stream(CONFIG, tensor, dtype=dtype, pack_kind=kind)
    assert len(alive) == len(state)
    pairs = [(expected, streamed), *zip(expected.blocks, streamed.blocks, strict=True)]
    for ours, theirs in pairs:
        for field in dataclasses.fields(ours):
            if field.name not in ("config", "blocks"):
                both = zip(_numbers(getattr(ours, field.name)), _numbers(getattr(theirs, field.name)), strict=True)
                assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in both)
    assert streamed.nbytes == expected.nbytes


def test_a_streamed_weight_of_another_shape_is_refused() -> None:
    state = _state()
    state["norm.weight"] = torch.ones(71)
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(71,\)"):
        GeneratorWeights.stream(CONFIG, state.__getitem__)
