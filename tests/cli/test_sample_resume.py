"""gear-engine sample in a folder that it has begun: resumed to the same files, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.sample_runs import Interrupt, files, sample


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_an_interrupted_run_resumes_to_the_same_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rng: str
) -> None:
    assert sample(checkpoint, tmp_path / "whole", "--rng", rng) == 0
    with monkeypatch.context() as patch:
        Interrupt(patch, call=2)
        assert sample(checkpoint, tmp_path / "broken", "--rng", rng) == 130
    assert "run the same command again" in capsys.readouterr().err
    run = tmp_path / "broken" / "exp" / "step0000007" / "cfg1-temp1"
    assert len(list((run / "samples").glob("*.png"))) == 4
    assert not (run / "samples.npz").exists()
    image = run / "samples" / "000001.png"
    image.write_bytes(image.read_bytes()[:-30])
    with monkeypatch.context() as patch:
        again = Interrupt(patch, call=99)
        assert sample(checkpoint, tmp_path / "broken", "--rng", rng) == 0
    assert again.drawn == ([1, 4] if rng == "philox" else [0, 1, 4, 5])
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_a_finished_run_is_left_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(checkpoint, tmp_path, "--no-keep-pngs", count=2) == 0
    before = files(tmp_path)
    assert sorted(Path(name).name for name in before) == ["run.json", "samples.npz"]
    again = Interrupt(monkeypatch, call=0)
    assert sample(checkpoint, tmp_path, "--no-keep-pngs", count=2) == 0
    assert again.drawn == []
    assert "nothing to do" in capsys.readouterr().out
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seed", "1"], "seed = 0"),
        (["--rng", "torch"], "rng"),
        (["--dtype", "bf16"], "dtype"),
        (["--no-use-ar-ema"], "checkpoint.ema"),
        (["--labels", "balanced"], "labels.source"),
        (["--image-size-eval", "32"], "image_size_eval = 64"),
        (["--fid-num", "3"], "num_images"),
    ],
)
def test_a_run_with_other_settings_is_refused(
    checkpoint: Path,
    finished_run: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    named: str,
) -> None:
    before = files(finished_run)
    assert sample(checkpoint, finished_run, *flags, count=2) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert "Traceback" not in shown
    assert files(finished_run) == before


@pytest.fixture(scope="module")
def finished_run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    assert sample(checkpoint, output, count=2) == 0
    return output


def test_another_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(checkpoint, tmp_path, count=2) == 0
    weights = torch.load(checkpoint, weights_only=True)
    weights["steps"] = 8
    other = tmp_path / "exp" / "checkpoints" / "0000007.pt"
    other.parent.mkdir()
    torch.save(weights, other)
    assert sample(other, tmp_path, count=2) == 2
    assert "checkpoint.sha256" in capsys.readouterr().err


def test_auto_that_chooses_other_kernels_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command after another build: nearly the same numbers, but not the same."""
    assert sample(checkpoint, tmp_path, "--backend", "reference", count=2) == 0
    (run,) = tmp_path.rglob("run.json")
    recorded = json.loads(run.read_text())["settings"]["backend"]
    assert {recorded[op] for op in ("decode_attention", "skinny_linear", "sample_tokens")} == {"reference"}
    assert recorded["decoder"] in ("cpu", "reference")
    other = "reference" if recorded["decoder"] == "cpu" else "cpu"
    monkeypatch.setattr("gear_engine.tokenizers.decoder_name", lambda *decoder: other)
    assert sample(checkpoint, tmp_path, "--backend", "reference", count=2) == 2
    assert f'backend.decoder = "{recorded["decoder"]}", this run asks for "{other}"' in capsys.readouterr().err


def test_philox_resumes_with_another_batch(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample(checkpoint, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        Interrupt(patch, call=1)
        assert sample(checkpoint, tmp_path / "broken") == 130
    assert sample(checkpoint, tmp_path / "broken", "--per-proc-batch-size", "3") == 0
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_torch_does_not_resume_with_another_batch(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(checkpoint, tmp_path, "--rng", "torch", count=2) == 0
    assert sample(checkpoint, tmp_path, "--rng", "torch", "--per-proc-batch-size", "1", count=2) == 2
    assert "per_proc_batch_size = 2" in capsys.readouterr().err


def test_a_full_disk_leaves_a_folder_that_resumes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    from gear_engine.runs import png

    assert sample(checkpoint, tmp_path / "whole") == 0
    write = png.write_atomic
    written = []

    def until_full(path: Path, data: bytes, *, sync: bool) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write(path, data, sync=sync)

    with monkeypatch.context() as patch:
        patch.setattr(png, "write_atomic", until_full)
        assert sample(checkpoint, tmp_path / "broken") == 1
    assert "no space left" in capsys.readouterr().err
    assert sample(checkpoint, tmp_path / "broken") == 0
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
