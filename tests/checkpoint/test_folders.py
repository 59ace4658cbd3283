"""Folders of our own format: what was damaged or described wrongly does not load."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.checkpoint import (
    checkpoint_hash,
    load_generator,
    load_pair,
    load_tokenizer,
    read_generator,
    save_pretrained,
)
from gear_engine.checkpoint.safetensors_file import write_safetensors
from gear_engine.errors import CheckpointError
from tests.checkpoint import files
from tests.checkpoint.files import GENERATOR, HEADS
from tests.checkpoint.mutations import disturb, flip


def test_save_pretrained_and_damage(stage1: Path, tmp_path: Path) -> None:
    pair, folder = load_pair(stage1, **HEADS), tmp_path / "saved"
    save_pretrained(folder, pair.generator, pair.tokenizer)
    assert files.equal(load_tokenizer(folder).state_dict(), files.tokenizer_state())
    digest = checkpoint_hash(folder)
    with pytest.raises(CheckpointError, match="not empty"):
        save_pretrained(folder, pair.generator)
    weights = folder / "generator.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert checkpoint_hash(folder) != digest
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_generator(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        load_tokenizer(folder)
    with pytest.raises(CheckpointError, match="nothing to save"):
        save_pretrained(tmp_path / "empty")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"generator": None},
        {"generator": {"config": {"dim": 47}}},
        {"generator": {"config": {"dim": 48, "unknown": 1}}},
        {"generator": []},
        {"generator": {"config": {"dim": "48", "n_layer": [], "n_head": None}}},
    ],
)
def test_a_wrong_description(stage1: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "saved"
    save_pretrained(folder, load_generator(stage1, **HEADS))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError):
        load_generator(folder)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError):
        load_generator(folder)


@pytest.mark.parametrize(
    ("part", "field", "value", "match"),
    [
        ("generator", "n_layer", 10**9, "n_layer: config.json says 1000000000, but generator.safetensors says 3"),
        ("generator", "dim", 10**6, "dim: config.json says 1000000, but generator.safetensors says 48"),
        ("generator", "num_classes", 8, "has_uncond_class: config.json says True"),
        ("generator", "vocab_size", 10**30, "out of every range"),
        ("tokenizer", "ch_mult", [1, 4], "ch_mult"),
        ("tokenizer", "num_res_blocks", 10**9, "num_res_blocks"),
        ("tokenizer", "codebook_embed_dim", 10**12, "out of every range"),
        ("tokenizer", "codebook_embed_dim", "x", "not possible"),
    ],
)
def test_a_description_of_other_weights(
    stage1: Path, tmp_path: Path, part: str, field: str, value: Any, match: str
) -> None:
    folder = tmp_path / "saved"
    pair = load_pair(stage1, **HEADS)
    save_pretrained(folder, pair.generator, pair.tokenizer)
    description = json.loads((folder / "config.json").read_text())
    description[part]["config"][field] = value
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=match):
        load_pair(folder)


def test_many_mutated_descriptions(stage1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_pretrained(folder, load_generator(stage1, **HEADS))
    path = folder / "config.json"
    text, rng, loaded = path.read_bytes(), random.Random(0), 0
    for index in range(400):
        path.write_bytes(flip(rng, text) if index % 2 else disturb(rng, text))
        try:
            config, state, _ = read_generator(folder)
        except CheckpointError:
            continue
        loaded += 1
        assert files.generator_shapes(config) == files.generator_shapes(GENERATOR)
        assert files.equal(state, files.generator_state())
    assert 0 < loaded < 300


def test_folder_overrides_must_agree(stage1: Path, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "saved", load_generator(stage1, **HEADS))
    assert load_generator(tmp_path / "saved", n_head=4, image_size=64).config == GENERATOR
    with pytest.raises(CheckpointError, match=r"config\.json says 4.*your n_head says 2"):
        load_generator(tmp_path / "saved", n_head=2)


def test_our_safetensors_are_the_librarys(tmp_path: Path) -> None:
    import safetensors.torch

    state = {**files.generator_state(), "half": torch.randn(3, 5).half(), "strided": torch.randn(4, 6).t()}
    write_safetensors(tmp_path / "x.safetensors", state, {"format": "pt"})
    assert files.equal(safetensors.torch.load_file(tmp_path / "x.safetensors"), state)
