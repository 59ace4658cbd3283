"""Training settings: the shipped files load, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gear_engine.training
from gear_engine.config import TOKENIZER_PRESETS
from gear_engine.errors import ConfigError
from gear_engine.training import config_from_table, load_config
from tests.training.tiny import config

SHIPPED = sorted((Path(gear_engine.training.__file__).parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path) -> None:
    settings = load_config(path)
    assert config_from_table(settings.to_dict()) == settings


def test_a_preset_can_be_changed() -> None:
    table = {"stage": "tokenizer", "steps": 1, "batch_size": 1, "tokenizer": {"preset": "LFQ-16", "ch": 32}}
    settings = config_from_table(table)
    assert settings.tokenizer == TOKENIZER_PRESETS["LFQ-16"].replace(ch=32)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("", {"batchsize": 3}, "batchsize is no setting"),
        ("", {"steps": "many"}, "steps must be a int"),
        ("", {"steps": 0}, "steps must be at least 1"),
        ("", {"stage": "both"}, "stage must be one of tokenizer, joint, generator"),
        ("data", {"crop": "middle"}, "crop must be one of"),
        ("data", {"image_size": 9}, "not a positive multiple"),
        ("data", 5, "data must be a table"),
        ("loss", {"lecam_decay": 1.0}, r"lecam_decay must lie in \[0, 1\)"),
        ("alignment", {"tau": 0.0}, "tau must be positive"),
        ("alignment", {"depth": 9}, "depth 9 is beyond"),
        ("tokenizer", {"preset": "VQ-17"}, "VQ-17"),
        ("tokenizer", {"ch_mult": [1, 1.5]}, "ch_mult must be a list of integers"),
        ("generator", {"preset": "GEAR-T2I-B"}, "no class-conditional size"),
        ("generator", {"n_head": 3}, "not divisible by n_head"),
        ("encoder", {"kind": "none"}, "aligns to an encoder"),
        ("encoder", {"kind": "dinov2"}, "needs encoder.kind = 'small'"),
    ],
)
def test_what_is_wrong_is_named(section: str, change: Any, message: str) -> None:
    table = config("joint").to_dict()
    if section and isinstance(change, dict):
        table[section] = table[section] | change
    elif section:
        table[section] = change
    else:
        table |= change
    with pytest.raises(ConfigError, match=message):
        config_from_table(table)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml")
    path = tmp_path / "broken.toml"
    path.write_text("stage = ")
    with pytest.raises(ConfigError, match=r"broken\.toml is no TOML"):
        load_config(path)
    path.write_text('stage = "joint"\nsteps = 3\n')
    with pytest.raises(ConfigError, match=r"broken\.toml: batch_size is missing"):
        load_config(path)
