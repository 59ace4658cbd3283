"""gear-engine info and gear-engine demo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from gear_engine.cli.demo import random_generator, random_tokenizer
from gear_engine.cli.main import main


def test_info_shows_versions_devices_and_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    import gear_engine.ops  # noqa: F401
    from gear_engine.ops import backends

    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "device cpu" in shown
    for op, backend, status in backends.table(torch.device("cpu"), torch.float32):
        assert any(line.split()[:2] == [op, backend] and status in line for line in shown.splitlines()), op


@pytest.mark.parametrize(("model", "edge"), [("shapes", 64), ("random", 128)])
def test_demo_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, edge: int) -> None:
    assert main(["demo", "--output-dir", str(tmp_path / "out"), "--images", "2", "--model", model]) == 0
    shown = capsys.readouterr().out
    path = tmp_path / "out" / "samples.png"
    assert str(path) in shown
    assert shown.count("images/s") == 2
    with Image.open(path) as picture:
        assert 2 * edge < picture.width < 3 * edge
        assert len(picture.getcolors(2**20) or []) > 1000


def test_demo_weights_follow_from_the_seed() -> None:
    for make in (random_generator, random_tokenizer):
        one, again, other = (make(seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("flags", [["--images", "0"], ["--backend", "vulkan"], ["--device", "cuda:99"]])
def test_demo_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert main(["demo", "--output-dir", str(tmp_path / "out"), *flags]) == 2
    assert "error:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
