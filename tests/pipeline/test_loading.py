"""Pipelines are saved and loaded; models that do not fit each other are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine import pipeline
from gear_engine.errors import CheckpointError, ConfigError, InvalidRequestError
from gear_engine.pipeline import Pipeline
from gear_engine.text_encoders import QwenTextEncoder, T5TextEncoder
from gear_engine.tokenizers import Tokenizer
from tests.pipeline.models import CLASS_CONFIG, GEAR_TEXT_CONFIG, Tower, WordTokenizer, make_generator


def test_save_and_load(pipe: Pipeline, tmp_path: Path) -> None:
    tokens = pipe([1, 2], seeds=[1, 2], output_type="latent").tokens
    pipe.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model", max_images=1)
    loaded.set_progress_bar_config(disable=True)
    out = loaded([1, 2], seeds=[1, 2])
    assert torch.equal(out.tokens, tokens)
    assert loaded.image_size == 8
    with pytest.raises(CheckpointError, match="not empty"):
        pipe.save_pretrained(tmp_path / "model")
    bf16 = Pipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    bf16.set_progress_bar_config(disable=True)
    assert bf16.generator.tok_embeddings.weight.dtype == torch.bfloat16
    assert bf16.tokenizer.dtype == torch.float32
    assert bf16([1], seeds=1).tokens.shape == (1, 16)
    with pytest.raises(ConfigError, match="unknown option 'imagesize'"):
        Pipeline.from_pretrained(tmp_path / "model", imagesize=256)
    with pytest.raises(CheckpointError):
        Pipeline.from_pretrained(tmp_path / "nothing")


def test_load_from_an_official_file(pipe: Pipeline, tmp_path: Path) -> None:
    weights = {"ema": pipe.generator.state_dict(), "vq_ema": pipe.tokenizer.state_dict()}
    torch.save(weights, tmp_path / "0000001.pt")
    loaded = Pipeline.from_pretrained(tmp_path / "0000001.pt", n_head=2, image_size=8, downsample_ratio=2)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(
        loaded([3], seeds=1, output_type="latent").tokens, pipe([3], seeds=1, output_type="latent").tokens
    )
    torch.save({"ema": pipe.generator.state_dict()}, tmp_path / "alone.pt")
    options = {"n_head": 2, "image_size": 8, "downsample_ratio": 2}
    with pytest.raises(CheckpointError):
        Pipeline.from_pretrained(tmp_path / "alone.pt", **options)
    given = Pipeline.from_pretrained(tmp_path / "alone.pt", pipe.tokenizer, **options)
    assert given.tokenizer is pipe.tokenizer


@pytest.mark.parametrize(
    ("args", "dtype"),
    [
        ({"mixed_precision": "fp16"}, torch.float16),
        ({"mixed_precision": "no"}, torch.float32),
        ({}, torch.bfloat16),
    ],
)
def test_the_text_encoder_of_the_training(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: dict[str, str], dtype: torch.dtype
) -> None:
    path = tmp_path / "text.pt"
    # "no" is what the trainer stores for fp32; the architecture follows from the shapes and the options.
    saved = {"text_encoder": "Qwen/Qwen3-1.7B", **args}
    torch.save({"ema": make_generator(GEAR_TEXT_CONFIG).state_dict(), "args": saved}, path)
    options = {"n_head": 2, "image_size": 8, "downsample_ratio": 2, "cls_token_num": 6, "text_attn": "causal"}
    pipe = Pipeline.from_pretrained(path, tokenizer, **options)
    with pytest.raises(InvalidRequestError, match=r"'Qwen/Qwen3-1.7B' \(the checkpoint's own\)"):
        pipe(prompt="a cat")
    opened: list[tuple[str, dict[str, Any]]] = []

    def load(name: str, **options: Any) -> QwenTextEncoder:
        opened.append((name, options))
        return QwenTextEncoder(WordTokenizer(), Tower(), 6)

    monkeypatch.setattr(pipeline, "load_text_encoder", load)
    Pipeline.from_pretrained(path, tokenizer, text_encoder="owner/name@1", **options)
    assert opened == [("owner/name@1", {"max_length": 6, "device": None, "dtype": dtype})]


def test_models_that_do_not_fit(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="the generator draws 60 codes"):
        Pipeline(make_generator(CLASS_CONFIG.replace(vocab_size=60)), tokenizer)
    with pytest.raises(ConfigError, match="takes no text encoder"):
        Pipeline(make_generator(), tokenizer, QwenTextEncoder(WordTokenizer(), Tower(), 6))
    text = make_generator(GEAR_TEXT_CONFIG)
    with pytest.raises(ConfigError, match="5 x 20"):
        Pipeline(text, tokenizer, QwenTextEncoder(WordTokenizer(), Tower(), 5))
    with pytest.raises(ConfigError, match="T5"):
        Pipeline(text, tokenizer, T5TextEncoder(WordTokenizer(), Tower(), 6))
