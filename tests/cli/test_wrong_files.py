"""A sound file in the wrong command: refused with the reason, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gear_engine.cli.main import main
from gear_engine.tokenizers import build_tokenizer
from tests.cli import tiny


@pytest.fixture(scope="module")
def parts(checkpoint: Path, text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The whole checkpoints, and files that hold a part of one."""
    folder = tmp_path_factory.mktemp("parts")
    root: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    other = build_tokenizer(tiny.TOKENIZER.replace(codebook_size=32)).state_dict()
    contents = {
        "tokenizer": {"vq": root["vq"], "vq_ema": root["vq_ema"]},
        "generator": {"ar": root["ar"], "ema": root["ema"], "args": root["args"]},
        "other": {"vq": other},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    Image.new("RGB", (16, 16)).save(folder / "image.png")
    return {"whole": checkpoint, "text": text_checkpoint, "image": folder / "image.png"} | {
        name: folder / f"{name}.pt" for name in contents
    }


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample --fid-num 1 --ckpt-path {text}", "use gear-engine sample-t2i"),
        ("sample --fid-num 1 --ckpt-path {tokenizer}", "holds a tokenizer but no generator"),
        ("sample --fid-num 1 --ckpt-path {generator}", "holds no tokenizer and names none"),
        ("sample --fid-num 1 --ckpt-path {whole} --vq-ckpt-path {generator}", "holds no tokenizer and names none"),
        ("sample --fid-num 1 --ckpt-path {whole} --vq-ckpt-path {other}", "vocabulary is 64, but the tokenizer has 32"),
        ("sample --fid-num 1 --ckpt-path {image}", "neither a torch.save (zip) nor a safetensors file"),
        ("sample-t2i --features {image} --ckpt-path {text}", "cannot read features"),
        ("sample-t2i --features {tokenizer} --ckpt-path {text}", "cannot read features"),
        ("reconstruct {image} --tokenizer {generator}", "holds no tokenizer and names none"),
        ("reconstruct {whole} --tokenizer {whole}", "cannot read the image"),
    ],
)
def test_refused(
    parts: dict[str, Path], command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*(word.format(**parts) for word in command.split()), *output]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_conversion_refuses_too(parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, flags, message in (
        (parts["generator"], [], "holds no tokenizer and names none"),
        (parts["tokenizer"], ["--generator-only"], "holds a tokenizer but no generator"),
        (parts["whole"], ["--tokenizer", str(parts["other"])], "vocabulary is 64, but the tokenizer has 32"),
    ):
        assert main(["convert", str(source), str(tmp_path / "out"), *flags]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
