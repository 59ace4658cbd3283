"""How a pipeline decodes: precision, device, beside the drawing of the next images, within memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gear_engine.errors import BackendUnavailableError, OutOfMemoryError
from gear_engine.pipeline import Pipeline, PipelineOutput
from gear_engine.tokenizers import DeviceDecoder, Tokenizer, build_tokenizer
from gear_engine.tokenizers.decoder_fast import unavailable
from tests.pipeline.models import TOKENIZER_CONFIG, make_generator


def test_decoding_in_bf16(pipe: Pipeline) -> None:
    if unavailable(torch.bfloat16) is not None:
        with pytest.raises(BackendUnavailableError, match="a CPU with AVX-512"):
            Pipeline(pipe.generator, pipe.tokenizer, decode_dtype=torch.bfloat16)
        return
    fast = Pipeline(pipe.generator, pipe.tokenizer, decode_dtype=torch.bfloat16)
    fast.set_progress_bar_config(disable=True)
    exact, quick = (each([1, 2], seeds=[1, 2], output_type="pt") for each in (pipe, fast))
    assert torch.equal(exact.tokens, quick.tokens)
    mean_square = (exact.images - quick.images).square().mean()
    assert 0 < mean_square < 10**-4  # better than 40 dB, and not the fp32 decoder


def test_a_decoder_goes_where_the_tokenizer_goes(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("gear_engine.tokenizers.decoders.Decoder", lambda tokenizer, dtype: made.append("cpu"))
    monkeypatch.setattr(
        "gear_engine.tokenizers.decoders.DeviceDecoder",
        lambda tokenizer, dtype, batch, backend: made.append(f"{tokenizer.device}, {batch} at a time, {backend}"),
    )
    options = {"decode_dtype": torch.float32, "decode_batch": 3, "backend": "reference"}
    fresh = Pipeline(make_generator(), build_tokenizer(TOKENIZER_CONFIG), **options)
    fresh.to("meta")
    assert made == ["cpu", "meta, 3 at a time, reference"]


@pytest.mark.parametrize("source", ["philox", "torch"])
def test_decoding_overlaps_with_the_next_images(pipe: Pipeline, source: str) -> None:
    """A decoder with a side of its own is handed each part before the next is drawn; nothing else changes."""
    events: list[str] = []

    class Side:
        def run(self, work: Callable[[], None], tokens: torch.Tensor) -> Callable[[], None]:
            events.append(f"begin {len(tokens)}")
            work()
            return lambda: events.append("wait")

    def call(**more: Any) -> PipelineOutput:
        one = {"seeds": [4, 5, 6]} if source == "philox" else {"generator": torch.Generator().manual_seed(3)}
        return pipe([1, 2, 3], **one, **more)

    expected = call()
    pipe._decoder = DeviceDecoder(pipe.tokenizer, batch=2, side=Side())
    found = call(callback_on_step_end=lambda *step: events.append("step") if step[2] in (0, 15) else None)
    assert torch.equal(found.tokens, expected.tokens)
    assert events == ["step", "step", "begin 2", "step", "step", "begin 1", "wait", "wait"]
    for one, other in zip(found.images, expected.images, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1
    assert torch.equal(call(output_type="latent").images, expected.tokens)
    assert call(output_type="pt").images.shape == (3, 3, 8, 8)


def test_a_batch_that_does_not_fit_in_memory(tokenizer: Tokenizer) -> None:
    pipe = Pipeline(make_generator(), tokenizer, max_images=1000, memory_budget=4 * 10**6)
    with pytest.raises(OutOfMemoryError, match="max_images"):
        pipe(1, seeds=1)


def test_a_decoder_that_does_not_fit_is_refused_before_sampling(tokenizer: Tokenizer) -> None:
    steps = []
    pipe = Pipeline(make_generator(), tokenizer, max_images=2, memory_budget=1000)
    with pytest.raises(OutOfMemoryError, match="decoder, 2 images"):
        pipe([1, 2], callback_on_step_end=lambda *step: steps.append(step))
    assert not steps
