"""The shipped model: small, described, and trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gear_engine import Pipeline
from gear_engine.checkpoint import load_generator, load_tokenizer
from gear_engine.metrics import psnr
from gear_engine.pretrained import SHAPES
from gear_engine.tokenizers import to_uint8
from gear_engine.training.evaluation import HELD_OUT_SEED, scenes
from gear_engine.training.scenes import CLASS_NAMES


def test_it_is_small_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in SHAPES.iterdir()) < 16 * 2**20
    card = (SHAPES / "README.md").read_text()
    assert all(word in card for word in (*CLASS_NAMES, "Licence", "Data", "Limits", "PSNR"))


@torch.no_grad()
def test_it_reconstructs_and_predicts_scenes_it_was_not_trained_on() -> None:
    tokenizer, generator = load_tokenizer(SHAPES), load_generator(SHAPES)
    images, labels = scenes(64, HELD_OUT_SEED, 64)
    quant, _, info = tokenizer.encode(images / 127.5 - 1.0)
    restored = to_uint8(tokenizer.decode(quant)).permute(0, 3, 1, 2)
    assert float(psnr(restored, images).mean()) > 27.5
    codes = info[2].view(64, -1).long()
    right, wrong = (
        float(F.cross_entropy(generator(codes[:, :-1], each).flatten(0, 1), codes.flatten()))
        for each in (labels, labels.roll(1))
    )
    assert right < 0.9  # an untrained one: log 512 = 6.2
    assert wrong > right + 0.4  # the label is heard


def test_its_samples_differ_by_class_and_seed() -> None:
    out = Pipeline.from_pretrained(SHAPES)(class_labels=[6, 6, 2], guidance_scale=2.0, seeds=[1, 2, 1])
    assert [image.size for image in out.images] == [(64, 64)] * 3
    assert len({tuple(row.tolist()) for row in out.tokens}) == 3
