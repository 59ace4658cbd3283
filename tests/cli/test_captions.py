"""Prompts and precomputed caption features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gear_engine.cli.captions import FeatureFile, TextSource, read_prompts
from gear_engine.errors import InvalidRequestError
from gear_engine.runs.world import World
from tests.cli import tiny


def test_prompts_in_the_official_form(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"key": str(i), "caption": f"caption {i}", "caption_type": "short"}) for i in range(3)]
    path.write_text("\n".join([lines[0], "", lines[1], lines[2]]) + "\n")
    assert read_prompts(path) == ["caption 0", "caption 1", "caption 2"]
    assert read_prompts(path, 2) == ["caption 0", "caption 1"]


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    """JSON allows U+2028 and its like inside a string, and most writers leave them as they are."""
    path = tmp_path / "prompts.jsonl"
    captions = ["a\u2028b", "c\x85d\u2029", "漢字"]
    text = "\r\n".join(json.dumps({"caption": caption}, ensure_ascii=False) for caption in captions)
    path.write_bytes(text.encode())
    assert read_prompts(path) == captions


@pytest.mark.parametrize("line", ["a red fox", '{"prompt": "x"}', '["x"]', '{"caption": 3}'])
def test_a_line_without_a_caption_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"caption": "x"}\n' + line + "\n")
    with pytest.raises(InvalidRequestError, match="line 2"):
        read_prompts(path)


def test_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot read"):
        read_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidRequestError, match="no prompts"):
        read_prompts(tmp_path / "empty.jsonl")


def features(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({"states": torch.arange(4 * 6 * 24).view(4, 6, 24).float(), **tensors}, path)
    return path


def test_features_are_read_by_caption(tmp_path: Path) -> None:
    mask = torch.ones(4, 6, dtype=torch.int64).tril()
    uncond = torch.randn(6, 24)
    file = FeatureFile(features(tmp_path / "f.safetensors", mask=mask, uncond_states=uncond))
    assert file.count == 4
    states, valid = file.states([3, 1])
    assert torch.equal(states, torch.arange(4 * 6 * 24).view(4, 6, 24).float()[[3, 1]])
    assert valid is not None
    assert torch.equal(valid, mask[[3, 1]] != 0)
    empty = file.empty()
    assert empty is not None
    assert torch.equal(empty[0], uncond)
    assert empty[1] is None
    assert FeatureFile(tmp_path / "f.safetensors", limit=3).count == 3
    assert len(file.settings()["captions"]["features_sha256"]) == 64


@pytest.mark.parametrize(
    "tensors",
    [
        {"states": torch.zeros(4, 6)},
        {"mask": torch.ones(4, 5)},
        {"uncond_states": torch.zeros(6, 23)},
        {"uncond_states": torch.zeros(6, 24), "uncond_mask": torch.ones(7)},
        {"prompts": torch.zeros(3)},
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InvalidRequestError):
        FeatureFile(features(tmp_path / "f.safetensors", **tensors))


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").write_text("no")
    for path in (tmp_path / "f.safetensors", tmp_path / "absent"):
        with pytest.raises(InvalidRequestError, match="cannot read features"):
            FeatureFile(path)


def test_guidance_needs_the_empty_caption(tmp_path: Path) -> None:
    file = FeatureFile(features(tmp_path / "f.safetensors"))
    cpu = torch.device("cpu")
    TextSource(file, tiny.TEXT_GENERATOR, cpu, guided=False)
    with pytest.raises(InvalidRequestError, match="uncond_states"):
        TextSource(file, tiny.TEXT_GENERATOR, cpu, guided=True)
    learned = tiny.TEXT_GENERATOR.replace(learned_uncond=True, n_double_stream_layers=0)
    TextSource(file, learned, cpu, guided=True)


def test_the_official_share_of_each_process(tmp_path: Path) -> None:
    source = TextSource(
        FeatureFile(features(tmp_path / "f.safetensors")), tiny.TEXT_GENERATOR, torch.device("cpu"), False
    )
    world = World(rank=1, size=2)
    assert source.ordered_batches(World(), 3) == [[0, 1, 2], [3]]
    assert source.ordered_batches(world, 2) == [[1, 3]]
    assert source.torch_seed(5, world) == 11
