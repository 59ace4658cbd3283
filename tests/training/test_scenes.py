"""Rendered scenes, and the judge that looks at samples of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.errors import InvalidRequestError
from gear_engine.models.transformer import Transformer
from gear_engine.tokenizers import build_tokenizer
from gear_engine.training import DataConfig, open_source, scenes
from gear_engine.training.evaluation import HELD_OUT_SEED, JUDGE_SEED, Evaluation
from gear_engine.training.judge import accuracy, train_judge
from gear_engine.training.scenes import CLASS_NAMES, make_scenes, render_scene


def test_a_scene_depends_on_its_seed_and_number_alone() -> None:
    images, labels = make_scenes(11, seed=5, size=32)
    assert images.shape == (11, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == [i % len(CLASS_NAMES) for i in range(11)]
    alone, label = render_scene(5, 10, 32)
    assert np.array_equal(alone, images[10]) and label == labels[10]
    assert not np.array_equal(render_scene(6, 10, 32)[0], alone)
    assert not np.array_equal(render_scene(5, 2, 32)[0], alone)  # the same class


def test_a_larger_scene_is_the_same_scene() -> None:
    small, large = render_scene(3, 4, 32)[0].astype(float), render_scene(3, 4, 64)[0].astype(float)
    halved = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).mean() < 4


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)))
def test_a_shape_lies_inside_and_covers_its_share(label: int) -> None:
    image = render_scene(9, label, 64)[0].astype(float)
    bright = image[..., 0] > 140  # the shape is yellow on blue
    assert 0.06 < bright.mean() < 0.5
    assert not (bright[0].any() or bright[-1].any() or bright[:, 0].any() or bright[:, -1].any())


@pytest.mark.parametrize("bad", [(-1, 0, 64), (0, -1, 64), (0, 0, 8)])
def test_refused_scenes(bad: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidRequestError):
        render_scene(*bad)
    with pytest.raises(InvalidRequestError, match="at least 1"):
        make_scenes(0, 1)


def test_the_file_is_what_the_trainer_reads(tmp_path: Path) -> None:
    assert scenes.main([str(tmp_path / "x.npz"), "--count", "9", "--size", "16", "--seed", "4"]) == 0
    source = open_source(DataConfig(path=str(tmp_path / "x.npz"), image_size=16))
    assert source.class_names == list(CLASS_NAMES)
    assert source.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return Evaluation(32, held_out=128, judge_images=1024, judge_epochs=4)


def test_the_judge_knows_shapes_and_is_reproducible(evaluation: Evaluation) -> None:
    assert evaluation.judge_accuracy > 0.9
    assert accuracy(evaluation.judge, evaluation.images, (evaluation.labels + 1) % len(CLASS_NAMES)) < 0.1
    before = torch.random.get_rng_state()
    images, labels = evaluation.images[:64], evaluation.labels[:64]
    one, again = (train_judge(images, labels, 8, seed=3, epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert JUDGE_SEED != HELD_OUT_SEED


def test_untrained_samples_are_judged_worse_than_real_scenes(evaluation: Evaluation) -> None:
    tokenizer = build_tokenizer(
        TokenizerConfig(
            family="lfq",
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            downsample=2,
            z_channels=4,
            codebook_embed_dim=4,
            codebook_size=16,
            codebook_l2_norm=False,
        )
    )
    config = GeneratorConfig(dim=32, n_layer=1, n_head=2, vocab_size=16, block_size=256, num_classes=len(CLASS_NAMES))
    drawn = evaluation.samples(Transformer(config).eval(), tokenizer, count=16, cfg_scale=1.5)
    restored = evaluation.reconstruction(tokenizer, 16)
    real = evaluation.baseline_distance(64, seed=7)
    assert 0 <= real < drawn.frechet_distance and real < restored.frechet_distance
    assert drawn.count == restored.count == 16
    assert drawn.codes_used <= 16 and drawn.class_accuracy < 0.6 and restored.psnr < 20
