"""Files and settings that gear-engine sample refuses, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.cli.main import main
from tests.cli import tiny
from tests.cli.sample_runs import FAST, sample


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "no-checkpoint.pt"
    assert sample(nowhere, tmp_path / "file" / "out") == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert sample(nowhere, tmp_path / "out") == 2
    assert "no permission" in capsys.readouterr().err


def damaged(make: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        checkpoint = torch.load(source, weights_only=True)
        torch.save(make(checkpoint), target)

    return write


def transpose(checkpoint: dict[str, Any]) -> dict[str, Any]:
    name = "layers.0.feed_forward.w2.weight"
    checkpoint["ema"][name] = checkpoint["ema"][name].T.contiguous()
    return checkpoint


def not_a_number(checkpoint: dict[str, Any]) -> dict[str, Any]:
    checkpoint["ema"]["layers.0.attention.wo.weight"][3, 3] = float("nan")
    return checkpoint


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("payload-ran"),)


BAD_FILES: dict[str, Callable[[Path, Path], Any]] = {
    "a text file": lambda source, target: target.write_text("weights: none\n"),
    "truncated": lambda source, target: target.write_bytes(source.read_bytes()[:-5000]),
    "a pickle that runs code": damaged(lambda checkpoint: {**checkpoint, "args": Payload()}),
    "a transposed tensor": damaged(transpose),
    "a NaN": damaged(not_a_number),
    "absent": lambda source, target: None,
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    BAD_FILES[kind](checkpoint, tmp_path / "bad.pt")
    assert sample(tmp_path / "bad.pt", tmp_path / "out", count=1) == 2
    shown = capsys.readouterr().err
    assert "error:" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--cfg-scale", "nan"],
        ["--cfg-scale", "-1"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--top-k", "-1"],
        ["--temperature", "inf"],
        ["--image-size", "70"],
        ["--per-proc-batch-size", "0"],
        ["--per-proc-batch-size", "1000000000"],
        ["--fid-num", "0"],
        ["--seed", "-1"],
        ["--labels", "nowhere.txt"],
        ["--cfg-scale", "1", "1.0"],
        ["--device", "cuda:77"],
        ["--device", "abacus"],
        ["--backend", "vulkan"],
        ["--decode-batch", "0"],
        ["--tag", "a/b"],
        ["--tag", "../other"],
        ["--no-keep-pngs", "--no-pack-npz"],
    ],
    ids=" ".join,
)
def test_bad_settings_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    paths = ["--ckpt-path", str(checkpoint), "--output-dir", str(tmp_path / "out")]
    assert main(["sample", *paths, *FAST, "--fid-num", "2", *flags]) == 2
    shown = capsys.readouterr().err
    assert "error:" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("available", "named"), [(2_000_000, "lower --decode-batch"), (8_740_000, "max_images")])
def test_memory_is_planned_for_cache_and_decoder(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    named: str,
) -> None:
    """Two images decoded at once need 8.65 MB (8 maps of 64 x 64 x 32 floats each, and 64 x 32 x 32 floats of weights);
    the engine more than the rest."""
    monkeypatch.setattr("gear_engine.memory.available_bytes", lambda device: available)
    assert sample(checkpoint, tmp_path / "out", "--decode-batch", "2") == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_an_image_size_that_tokens_cannot_tile_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A published file says nothing about the size: what is asked for must be a multiple of the downsample."""
    weights = torch.load(checkpoint, weights_only=True)
    del weights["args"]
    torch.save(weights, tmp_path / "published.pt")
    assert sample(tmp_path / "published.pt", tmp_path / "out", "--image-size", "70", count=1) == 2
    shown = capsys.readouterr().err
    assert "70" in shown and "16" in shown and "Traceback" not in shown
    assert not (tmp_path / "out").exists()
    assert sample(tmp_path / "published.pt", tmp_path / "out", "--image-size", "64", count=1) == 0


@pytest.mark.parametrize("label", ["-1", str(tiny.NUM_CLASSES + 1)])
def test_a_label_out_of_range_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], label: str
) -> None:
    (tmp_path / "labels.txt").write_text(f"0\n{label}\n")
    assert sample(checkpoint, tmp_path / "out", "--labels", str(tmp_path / "labels.txt"), count=2) == 2
    assert f"label of image 1 is {label}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_model_is_sent_to_the_other_command(
    text_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(text_checkpoint, tmp_path / "out", count=1) == 2
    assert "sample-t2i" in capsys.readouterr().err
