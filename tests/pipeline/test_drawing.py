"""Pipeline: labels, prompts and precomputed states in; PIL, NumPy, torch or tokens out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gear_engine import compat
from gear_engine.errors import InvalidRequestError
from gear_engine.models.condition import TextCondition
from gear_engine.pipeline import Pipeline
from gear_engine.pipeline_inputs import label_list, seed_list
from gear_engine.text_encoders import QwenTextEncoder, T5TextEncoder
from gear_engine.tokenizers import Tokenizer, to_uint8
from tests.pipeline.models import (
    GEAR_TEXT_CONFIG,
    LLAMAGEN_TEXT_CONFIG,
    Tower,
    TowerThatSeesItsBatch,
    WordTokenizer,
    make_generator,
)


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
    assert tower.batches == [1]
    pipe(prompt="a cat", seeds=1, output_type="latent")
    pipe(prompt="a dog", seeds=1, output_type="latent")
    assert tower.batches == [1] * 4


def test_a_prompt_with_a_seed_does_not_depend_on_the_prompts_beside_it(tokenizer: Tokenizer) -> None:
    """Under the official draws a batch is encoded together, as officially."""
    tower = TowerThatSeesItsBatch()
    pipe = Pipeline(
        make_generator(GEAR_TEXT_CONFIG), tokenizer, QwenTextEncoder(WordTokenizer(), tower, 6), max_images=2
    )
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a blue cat", "dog", "an old red house"]
    together = pipe(prompt=prompts, seeds=[1, 2, 3], output_type="latent").tokens
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt=prompt, seeds=index + 1, output_type="latent").tokens
        assert torch.equal(alone[0], together[index])
    del tower.batches[:]
    pipe(prompt=prompts, generator=torch.Generator().manual_seed(5), output_type="latent")
    assert tower.batches == [2, 1]


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


def test_integers_of_any_form() -> None:
    assert label_list(np.int64(3)) == label_list(torch.tensor([3])) == label_list([3]) == [3]
    assert label_list(np.array([1, 2])) == label_list(torch.tensor([[1], [2]])) == [1, 2]
    assert seed_list(torch.tensor([4, 5]), 2) == seed_list(np.array([4, 5]), 2) == [4, 5]
    for wrong in ("12", [0.5], [True], None, torch.tensor([0.5]), ["1"]):
        with pytest.raises(InvalidRequestError, match="integers"):
            label_list(wrong)  # type: ignore[arg-type]
