"""Pipeline: labels, prompts and precomputed states in; PIL, NumPy, torch or tokens out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gear_engine import compat, pipeline
from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    OutOfMemoryError,
)
from gear_engine.models.condition import TextCondition
from gear_engine.models.transformer import Transformer
from gear_engine.pipeline import Pipeline, PipelineOutput
from gear_engine.pipeline_inputs import label_list, seed_list
from gear_engine.text_encoders import QwenTextEncoder, T5TextEncoder
from gear_engine.tokenizers import DeviceDecoder, Tokenizer, build_tokenizer, to_uint8
from gear_engine.tokenizers.decoder_fast import unavailable

CLASS_CONFIG = GeneratorConfig(dim=72, n_layer=2, n_head=2, vocab_size=50, block_size=16, num_classes=7)
GEAR_TEXT_CONFIG = CLASS_CONFIG.replace(
    conditioning="text", cls_token_num=6, caption_dim=20, n_double_stream_layers=1, text_attn="causal"
)
LLAMAGEN_TEXT_CONFIG = GEAR_TEXT_CONFIG.replace(n_double_stream_layers=0, learned_uncond=True)
TOKENIZER_CONFIG = TokenizerConfig(family="vq", codebook_size=50, ch=32, ch_mult=(1, 2), z_channels=32, downsample=2)


def make_generator(config: GeneratorConfig = CLASS_CONFIG) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    nn.init.normal_(model.output.weight, std=2 * config.dim**-0.5)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return build_tokenizer(TOKENIZER_CONFIG)


@pytest.fixture
def pipe(tokenizer: Tokenizer) -> Pipeline:
    made = Pipeline(make_generator(), tokenizer, max_images=2, decode_batch=2)
    made.set_progress_bar_config(disable=True)
    return made


def test_output_types(pipe: Pipeline) -> None:
    call = {"class_labels": [1, 2, 3], "seeds": [7, 8, 9]}
    pil = pipe(**call)
    assert pil.tokens.shape == (3, 16)
    assert pil.tokens.dtype == torch.int32
    assert all(isinstance(image, Image.Image) and image.size == (8, 8) for image in pil.images)
    decoded = pipe.tokenizer.decode_code(pil.tokens.long(), (3, 8, 4, 4)).detach()
    expected = to_uint8(decoded).numpy().astype(int)
    # One grey level: convolutions may round differently in another batch.
    assert np.abs(np.stack([np.asarray(image) for image in pil.images]).astype(int) - expected).max() <= 1
    array, tensor, latent = (pipe(**call, output_type=kind) for kind in ("np", "pt", "latent"))
    assert isinstance(array.images, np.ndarray)
    assert array.images.shape == (3, 8, 8, 3)
    assert array.images.dtype == np.float32
    assert tensor.images.shape == (3, 3, 8, 8)
    torch.testing.assert_close(tensor.images, (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(array.images, tensor.images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(latent.images, pil.tokens)
    assert torch.equal(latent.tokens, pil.tokens)


def test_an_image_depends_on_its_seed_and_not_on_its_batch(pipe: Pipeline) -> None:
    labels, seeds = [1, 2, 3, 4, 5], [11, 12, 13, 14, 15]
    together = pipe(labels, seeds=seeds, output_type="latent").tokens
    alone = [pipe(k, seeds=s, output_type="latent").tokens for k, s in zip(labels, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    other = pipe(labels, seeds=[s + 100 for s in seeds], output_type="latent").tokens
    assert (other != together).any(dim=1).all()


def test_a_generator_draws_in_the_official_order_and_splits_large_batches(pipe: Pipeline) -> None:
    labels = torch.tensor([1, 2, 3])
    tokens = pipe(labels, generator=torch.Generator().manual_seed(3), output_type="latent", top_k=20).tokens
    rng = torch.Generator().manual_seed(3)
    expected = [
        compat.generate(pipe.generator, part, 16, cfg_scale=4.0, top_k=20, generator=rng)
        for part in (labels[:2], labels[2:])
    ]
    compat.release()
    assert torch.equal(tokens, torch.cat(expected))


def test_without_seeds_the_global_generator_decides(pipe: Pipeline) -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return pipe([1, 2], output_type="latent").tokens

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(1)
    assert not torch.equal(*(pipe([1, 2], output_type="latent").tokens for _ in range(2)))


def test_num_images_per_prompt_are_neighbours(pipe: Pipeline) -> None:
    repeated = pipe([4, 5], num_images_per_prompt=2, seeds=[1, 2, 3, 4], output_type="latent").tokens
    assert torch.equal(repeated, pipe([4, 4, 5, 5], seeds=[1, 2, 3, 4], output_type="latent").tokens)


def test_callback_and_progress_bar(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []

    def watch(given: Pipeline, step: int, position: int, tensors: dict[str, torch.Tensor]) -> None:
        assert given is pipe
        seen.append((step, position))
        assert (tensors["tokens"][:, : min(step, 15) + 1] >= 0).all()

    pipe([1, 2], seeds=[1, 2], callback_on_step_end=watch, output_type="latent")
    assert seen == [(step, step) for step in range(16)]
    seen.clear()
    pipe.set_progress_bar_config(desc="drawing")
    pipe([1, 2], generator=torch.Generator(), callback_on_step_end=watch, output_type="latent")
    error = capsys.readouterr().err
    assert "drawing" in error
    assert "16/16" in error


def test_an_exception_in_the_callback_leaves_the_pipeline_usable(pipe: Pipeline) -> None:
    def stop(given: Pipeline, step: int, position: int, tensors: dict[str, torch.Tensor]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    before = pipe([1, 2, 3], seeds=[1, 2, 3], output_type="latent").tokens
    with pytest.raises(KeyboardInterrupt):
        pipe([1, 2, 3], seeds=[1, 2, 3], callback_on_step_end=stop)
    assert torch.equal(pipe([1, 2, 3], seeds=[1, 2, 3], output_type="latent").tokens, before)


def test_changed_weights_are_read_after_invalidate(pipe: Pipeline) -> None:
    before = pipe(1, seeds=1, output_type="latent").tokens
    for parameter in pipe.generator.parameters():
        parameter.data.mul_(1.5)
    pipe.invalidate()
    changed = pipe(1, seeds=1, output_type="latent").tokens
    assert not torch.equal(changed, before)
    fresh = Pipeline(pipe.generator, pipe.tokenizer)
    assert torch.equal(fresh(1, seeds=1, output_type="latent").tokens, changed)


class WordTokenizer:
    """Pads to the right with 0; a word's id is its length."""

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            words = [len(word) for word in text.split()][:max_length]
            ids[row, : len(words)] = torch.tensor(words, dtype=torch.long)
            mask[row, : len(words)] = 1
        return {"input_ids": ids, "attention_mask": mask}


class Tower(nn.Module):
    """A text tower whose states are embeddings of position and word."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.config = SimpleNamespace(hidden_size=20)
        self.words = nn.Embedding(12, 20)
        self.places = nn.Parameter(torch.randn(6, 20))
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(last_hidden_state=self.words(input_ids) + self.places)


def test_prompts_are_the_encoders_states(tokenizer: Tokenizer) -> None:
    encoder = QwenTextEncoder(WordTokenizer(), Tower(), 6)
    pipe = Pipeline(make_generator(GEAR_TEXT_CONFIG), tokenizer, encoder, max_images=3)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a blue cat", "dog", ""]
    tokens = pipe(prompt=prompts, seeds=[1, 2, 3], output_type="latent").tokens
    features, empty = encoder.encode(prompts), encoder.encode_empty()
    captions = TextCondition(features.states, features.mask, empty.states[0], empty.mask[0])
    assert torch.equal(pipe(captions=captions, seeds=[1, 2, 3], output_type="latent").tokens, tokens)
    torch.manual_seed(5)
    official = compat.generate_t2i(
        pipe.generator,
        features.states,
        empty.states.expand(3, -1, -1),
        16,
        features.mask,
        empty.mask.expand(3, -1),
        cfg_scale=2.0,
    )
    compat.release()
    rng = torch.Generator().manual_seed(5)
    assert torch.equal(pipe(prompt=prompts, guidance_scale=2.0, generator=rng, output_type="latent").tokens, official)
    twice = pipe(prompt=prompts, num_images_per_prompt=2, seeds=[1, 9, 2, 9, 3, 9], output_type="latent").tokens
    assert torch.equal(twice[::2], tokens)


def test_the_empty_caption_is_encoded_once(tokenizer: Tokenizer) -> None:
    tower = Tower()
    pipe = Pipeline(make_generator(GEAR_TEXT_CONFIG), tokenizer, QwenTextEncoder(WordTokenizer(), tower, 6))
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt="a cat", seeds=1, guidance_scale=1.0, output_type="latent")
    assert tower.calls == 1
    pipe(prompt="a cat", seeds=1, output_type="latent")
    pipe(prompt="a dog", seeds=1, output_type="latent")
    assert tower.calls == 4


def test_llamagen_prompts(tokenizer: Tokenizer) -> None:
    encoder = T5TextEncoder(WordTokenizer(), Tower(), 6)
    generator = make_generator(LLAMAGEN_TEXT_CONFIG)
    nn.init.normal_(generator.cls_embedding.uncond_embedding)
    pipe = Pipeline(generator, tokenizer, encoder)
    pipe.set_progress_bar_config(disable=True)
    tokens = pipe(prompt=["a cat", "dog"], generator=torch.Generator().manual_seed(5), output_type="latent").tokens
    features = encoder.encode(["a cat", "dog"])
    rng = torch.Generator().manual_seed(5)
    expected = compat.generate(generator, features.states, 16, features.mask, cfg_scale=4.0, generator=rng)
    compat.release()
    assert torch.equal(tokens, expected)


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
        lambda tokenizer, dtype, batch: made.append(f"{tokenizer.device}, {batch} at a time"),
    )
    fresh = Pipeline(make_generator(), build_tokenizer(TOKENIZER_CONFIG), decode_dtype=torch.float32, decode_batch=3)
    fresh.to("meta")
    assert made == ["cpu", "meta, 3 at a time"]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"class_labels": 1, "prompt": "a"}, "exactly one"),
        ({"class_labels": 1, "output_type": "jpeg"}, "output_type"),
        ({"class_labels": [1, 2], "seeds": [1]}, "2 images need 2 seeds"),
        ({"class_labels": 1, "seeds": 1, "generator": torch.Generator()}, "not both"),
        ({"class_labels": 8, "seeds": 1}, "label 8"),
        ({"class_labels": torch.tensor([0.5])}, "class_labels"),
        ({"class_labels": []}, "label"),
        ({"class_labels": 1, "seeds": -1}, "seed"),
        ({"class_labels": 1, "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"class_labels": 1, "guidance_scale": -2.0}, "cfg_scale"),
        ({"class_labels": 1, "top_p": 1.5}, "top_p"),
        ({"prompt": "a cat"}, "no text encoder"),
    ],
)
def test_bad_requests(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        pipe(**arguments)


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


def test_a_batch_that_does_not_fit_in_memory(tokenizer: Tokenizer) -> None:
    pipe = Pipeline(make_generator(), tokenizer, max_images=1000, memory_budget=10**6)
    with pytest.raises(OutOfMemoryError, match="max_images"):
        pipe(1, seeds=1)


def test_integers_of_any_form() -> None:
    assert label_list(np.int64(3)) == label_list(torch.tensor([3])) == label_list([3]) == [3]
    assert label_list(np.array([1, 2])) == label_list(torch.tensor([[1], [2]])) == [1, 2]
    assert seed_list(torch.tensor([4, 5]), 2) == seed_list(np.array([4, 5]), 2) == [4, 5]
    for wrong in ("12", [0.5], [True], None, torch.tensor([0.5]), ["1"]):
        with pytest.raises(InvalidRequestError, match="integers"):
            label_list(wrong)  # type: ignore[arg-type]


def test_a_decoder_that_does_not_fit_is_refused_before_sampling(tokenizer: Tokenizer) -> None:
    steps = []
    pipe = Pipeline(make_generator(), tokenizer, max_images=2, memory_budget=1000)
    with pytest.raises(OutOfMemoryError, match="decoder, 2 images"):
        pipe([1, 2], callback_on_step_end=lambda *step: steps.append(step))
    assert not steps
