"""The files of the shapes recipe lead into each other, and their last product is judged."""

from __future__ import annotations

import itertools
import json
from importlib import resources
from pathlib import Path

import pytest
import torch

from gear_engine import Pipeline
from gear_engine.bench import shapes
from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.models.transformer import Transformer
from gear_engine.tokenizers import build_tokenizer
from gear_engine.training import TrainConfig, load_config
from gear_engine.training.evaluation import HELD_OUT_SEED, JUDGE_SEED, Evaluation

_STAGES = ("0-small", "1-tokenizer", "2-joint", "3-generator")


def _configs() -> list[TrainConfig]:
    folder = resources.files("gear_engine.training") / "configs"
    return [load_config(Path(str(folder / f"shapes-{stage}.toml"))) for stage in _STAGES]


def test_each_stage_starts_where_the_last_one_ends() -> None:
    configs = _configs()
    assert [config.stage for config in configs] == ["tokenizer", "tokenizer", "joint", "generator"]
    for before, after in itertools.pairwise(configs):
        assert after.init.tokenizer == str(before.folder / "checkpoints" / f"{before.steps:07d}.pt")
        assert after.tokenizer == before.tokenizer
    assert configs[3].init.generator == configs[3].init.tokenizer
    assert configs[3].generator == configs[2].generator
    assert {JUDGE_SEED, HELD_OUT_SEED}.isdisjoint({11, 12})  # the seeds of docs/shapes.md


def test_figures_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(
        TokenizerConfig(
            family="lfq",
            ch=32,
            ch_mult=(1, 1, 1, 1),
            num_res_blocks=1,
            downsample=8,
            z_channels=4,
            codebook_embed_dim=4,
            codebook_size=16,
            codebook_l2_norm=False,
        )
    )
    generator = Transformer(GeneratorConfig(dim=32, n_layer=1, n_head=2, vocab_size=16, block_size=16, num_classes=8))
    Pipeline(generator, tokenizer).save_pretrained(tmp_path / "model")
    sizes: list[int] = []

    def small(size: int) -> Evaluation:
        sizes.append(size)
        return Evaluation(size, held_out=16, judge_images=64, judge_epochs=1)

    monkeypatch.setattr(shapes, "Evaluation", small)
    assert shapes.main([str(tmp_path / "model"), "--count", "8", "--output", str(tmp_path / "figures.json")]) == 0
    assert sizes == [32]
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["samples"]["count"] == found["reconstruction"]["count"] == 8
    assert found["samples"]["cfg_scale"] == 2.0 and found["samples_without_guidance"]["cfg_scale"] == 1.0
    assert f"PSNR {found['reconstruction']['psnr']:.2f} dB" in capsys.readouterr().out
