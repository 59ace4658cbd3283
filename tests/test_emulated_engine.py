"""Whole rollouts whose ops run the CUDA kernels, emulated on the CPU: the tokens of the compiled CPU path.

The steps are programs, called: on a GPU the same functions are captured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gear_engine.engine import Engine
from gear_engine.models.transformer import Transformer
from gear_engine.ops import GeneratorOps, backends, decode_attention_cuda, native, torch_exponential
from gear_engine.request import SamplingParams
from tests import emulation
from tests.models_for_tests import CLASS, TEXT, captions, small_model

P = SamplingParams
OPS = ("decode_attention", "skinny_linear", "sample_tokens")


@pytest.fixture
def emulated_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Engine, Counter[str]]]:
    """Makes an engine as on a GPU, and counts the calls of each op."""
    monkeypatch.setattr(native, "cuda_kernels", emulation.cuda_kernels)
    monkeypatch.setattr(decode_attention_cuda, "num_splits", lambda device, blocks, chunks: 1)

    def make(model: Transformer, **options: Any) -> tuple[Engine, Counter[str]]:
        calls: Counter[str] = Counter()

        def counted(op: str) -> Callable[..., Any]:
            kernel = backends.implementations(op)["cuda"].load()

            def call(*operands: Any, **more: Any) -> Any:
                calls[op] += 1
                return kernel(*operands, **more)

            return call

        kernels = {op: counted(op) for op in OPS} | {"torch_exponential": torch_exponential.reference}
        ops = GeneratorOps(**kernels, backends=dict.fromkeys(OPS, "cuda"))
        with monkeypatch.context() as patch:
            patch.setattr(GeneratorOps, "resolve", lambda *which: ops)
            return Engine(model, execution="eager", **options), calls

    return make


def test_labels(emulated_engine: Callable[..., tuple[Engine, Counter[str]]]) -> None:
    """Prefill and a step of two images, one of them guided: three rows, and an inert one in their bucket."""
    model, options = small_model(CLASS.replace(n_layer=1)), {"max_images": 2, "max_new_tokens": 2}
    engine, calls = emulated_engine(model, **options)
    params = [P(cfg_scale=3.0, top_k=20), P(temperature=0.9, top_p=0.9)]
    expected = Engine(model, backend="cpu", **options).generate([1, 7], params, seeds=[5, 6])
    assert torch.equal(engine.generate([1, 7], params, seeds=[5, 6]), expected)
    assert calls == {"decode_attention": 1, "skinny_linear": 5 * 2, "sample_tokens": 2}


def test_a_caption_under_the_official_draws(emulated_engine: Callable[..., tuple[Engine, Counter[str]]]) -> None:
    model, options = small_model(TEXT.replace(n_layer=1)), {"max_images": 1, "max_new_tokens": 2}
    drawn = []
    for engine in (emulated_engine(model, **options)[0], Engine(model, backend="cpu", **options)):
        torch.manual_seed(3)
        drawn.append(engine.generate(captions(1), P(cfg_scale=3.0), rng="torch"))
    assert torch.equal(*drawn)
