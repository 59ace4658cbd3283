"""Weights of the engine: read in place, swapped, cast, packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gear_engine.engine import Engine
from gear_engine.errors import CheckpointError, ConfigError
from gear_engine.request import ImageRequest, SamplingParams
from tests.models_for_tests import CLASS, GUIDED, TEXT, drain, fresh_model, small_model

P = SamplingParams


class TestWeights:
    def test_are_read_in_place(self) -> None:
        model = fresh_model()
        engine = Engine(model)
        before = engine.generate([1], seeds=[0])
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.flip(0))
        after = engine.generate([1], seeds=[0])
        assert not torch.equal(before, after)
        assert torch.equal(after, Engine(model).generate([1], seeds=[0]))
        assert {w.data_ptr() for _, w in engine.weights._named()} == {p.data_ptr() for p in model.parameters()}

    @pytest.mark.parametrize("backend", ["reference", "auto"])
    def test_strides_do_not_matter(self, backend: str) -> None:
        model = fresh_model()
        expected = Engine(model, backend=backend).generate([1, 2], GUIDED)
        assert model.weights().nbytes_as(torch.float32) == 0
        for parameter in model.parameters():
            wide = torch.zeros(*parameter.shape, 2)
            wide[..., 0] = parameter.data
            parameter.data = wide[..., 0]
        weights = model.weights()
        assert weights.nbytes_as(torch.float32) == weights.nbytes, "copies are planned for"
        assert torch.equal(Engine(model, backend=backend).generate([1, 2], GUIDED), expected)

    def test_weights_in_two_places_or_none(self) -> None:
        model = fresh_model()
        model.layers[1].to("meta")
        with pytest.raises(CheckpointError, match=r"layers\.1\.attention_norm\.weight is meta.*which is cpu"):
            Engine(model)
        with pytest.raises(ConfigError, match="meta device"):
            Engine(model.to("meta"))

    def test_layers_wrapped_by_compile(self) -> None:
        model = fresh_model()
        expected = Engine(model).generate([1])
        model.layers[0] = torch.compile(model.layers[0])
        assert torch.equal(Engine(model).generate([1]), expected)

    def test_bind_swaps_and_releases(self) -> None:
        engine = Engine(small_model())
        before = engine.generate([1])
        other = fresh_model()
        other.output.weight.data.mul_(-1)
        engine.bind(other)
        assert not torch.equal(engine.generate([1]), before)
        engine.bind(None)
        with pytest.raises(ConfigError, match="bind"):
            engine.generate([1])
        engine.bind(small_model())
        assert torch.equal(engine.generate([1]), before)
        with pytest.raises(ConfigError, match="built for"):
            engine.bind(small_model(TEXT))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        model = fresh_model()
        engine = Engine(model, dtype=dtype)
        tokens = engine.generate([1, 2], GUIDED)
        assert engine.cache.dtype == dtype
        assert all(p.dtype == torch.float32 for p in model.parameters())
        exact = Engine(model.to(dtype)).generate([1, 2], GUIDED)
        assert torch.equal(tokens, exact)

    @pytest.mark.parametrize("kind", ["bf16", "int8"])
    def test_packed(self, kind: Any) -> None:
        engine = Engine(small_model(), weight_format=kind, backend="reference")
        tokens = engine.generate([1, 2], P(sample_logits=False), max_new_tokens=2)
        exact = Engine(small_model()).generate([1, 2], P(sample_logits=False), max_new_tokens=2)
        assert tokens.shape == exact.shape
        assert (tokens[:, 0] == exact[:, 0]).any(), "packed weights are close to the exact ones"

    def test_autocast_is_off_inside(self) -> None:
        engine = Engine(small_model())
        expected = engine.generate([1, 2], GUIDED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(engine.generate([1, 2], GUIDED), expected)

    def test_tokens_can_be_used_by_autograd(self) -> None:
        engine = Engine(small_model())
        tokens = engine.generate([1])
        table = torch.ones(CLASS.vocab_size, 3, requires_grad=True)
        torch.nn.functional.embedding(tokens, table).sum().backward()
        engine.add_request(ImageRequest(label=1))
        torch.nn.functional.embedding(drain(engine)[0].tokens, table).sum().backward()

    def test_training_mode_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="eval"):
            Engine(fresh_model().train())
