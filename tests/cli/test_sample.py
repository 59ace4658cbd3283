"""gear-engine sample, from a checkpoint file to PNGs, npz and run.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gear_engine.cli.main import main
from gear_engine.engine import Engine
from gear_engine.runs.labels import random_labels, text_hash
from gear_engine.tokenizers import DeviceDecoder, Tokenizer
from tests.cli import tiny

FAST = ["--per-proc-batch-size", "2", "--image-size-eval", str(tiny.IMAGE_SIZE), "--device", "cpu"]


def sample(checkpoint: Path, output: Path, *flags: str, count: int = 5) -> int:
    paths = ["--ckpt-path", str(checkpoint), "--output-dir", str(output)]
    return main(["sample", *paths, "--fid-num", str(count), *FAST, *flags])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pixels(run: Path) -> np.ndarray:
    with np.load(run / "samples.npz") as archive:
        return np.asarray(archive["arr_0"])


def test_the_official_layout(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(checkpoint, tmp_path, "--cfg-scale", "1.5", "--top-k", "20") == 0
    run = tmp_path / "exp" / "step0000007" / "cfg1.5-temp1-topk20"
    assert sorted(p.name for p in run.iterdir()) == ["run.json", "samples", "samples.npz"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [f"{i:06d}.png" for i in range(5)]
    packed = pixels(run)
    assert packed.shape == (5, 64, 64, 3)
    assert packed.dtype == np.uint8
    for index in range(5):
        with Image.open(run / "samples" / f"{index:06d}.png") as image:
            assert np.array_equal(np.asarray(image), packed[index])
    assert len({image.tobytes() for image in packed}) == 5
    shown = capsys.readouterr()
    assert str(run / "samples.npz") in shown.out
    assert "resized" not in shown.out
    assert "image/s" in shown.err


def test_torch_gives_the_official_labels_tokens_and_pixels(checkpoint: Path, tmp_path: Path) -> None:
    assert sample(checkpoint, tmp_path, "--rng", "torch", "--seed", "3", "--cfg-scale", "2", "--top-p", "0.9") == 0
    run = tmp_path / "exp" / "step0000007" / "cfg2-temp1-topp0.9"
    expected = tiny.official_run(count=5, batch=2, seed=3, cfg_scale=2.0, top_p=0.9)
    official = np.stack([expected[index][1] for index in range(5)])
    assert np.abs(pixels(run).astype(int) - official.astype(int)).max() <= 1
    recorded = json.loads((run / "run.json").read_text())["settings"]
    assert recorded["labels"]["sha256"] == text_hash([expected[index][0] for index in range(5)])


def test_philox_images_depend_on_no_batch(checkpoint: Path, tmp_path: Path) -> None:
    for name, batch in (("one", "1"), ("three", "3")):
        assert sample(checkpoint, tmp_path / name, "--cfg-scale", "2", "--per-proc-batch-size", batch) == 0
    one, three = (pixels(tmp_path / name / "exp" / "step0000007" / "cfg2-temp1") for name in ("one", "three"))
    assert np.array_equal(one, three)


def test_a_decoder_in_bf16_is_close_or_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = sample(checkpoint, tmp_path / "decoder", "--decode-dtype", "bf16", count=2)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert status == 2
        assert "bf16 convolutions need a CPU with AVX-512" in capsys.readouterr().err
        return
    assert status == 0
    assert sample(checkpoint, tmp_path / "exact", count=2) == 0
    exact, rounded = (pixels(tmp_path / name / "exp" / "step0000007" / "cfg1-temp1") for name in ("exact", "decoder"))
    difference = np.abs(exact.astype(int) - rounded.astype(int))
    assert difference.max() > 0 and difference.mean() < 2  # the same tokens, decoded with rounded operands


def test_packed_weights_are_used_and_recorded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = []
    generate = Engine.generate

    def spy(engine: Engine, *args: Any, **options: Any) -> torch.Tensor:
        formats.append(engine.weight_format)
        return generate(engine, *args, **options)

    monkeypatch.setattr(Engine, "generate", spy)
    assert sample(checkpoint, tmp_path / "int8", "--weight-format", "int8", count=2) == 0
    assert formats == ["int8"]
    run = tmp_path / "int8" / "exp" / "step0000007" / "cfg1-temp1"
    assert json.loads((run / "run.json").read_text())["settings"]["weight_format"] == "int8"


def test_run_json_says_what_was_done(checkpoint: Path, tmp_path: Path) -> None:
    assert sample(checkpoint, tmp_path, "--seed", "4", "--no-use-ar-ema") == 0
    record = json.loads((tmp_path / "exp" / "step0000007" / "cfg1-temp1" / "run.json").read_text())
    settings = record["settings"]
    import hashlib

    assert settings["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert settings["checkpoint"]["ema"] is False
    assert settings["tokenizer"]["ema"] is True
    assert settings["labels"] == {"source": "random", "sha256": text_hash(random_labels(4, 5, tiny.NUM_CLASSES))}
    names = ("seed", "rng", "dtype", "world_size", "per_proc_batch_size", "num_images", "image_size", "image_size_eval")
    assert [settings[name] for name in names] == [4, "philox", "fp32", 1, 2, 5, 64, 64]
    assert settings["sampling"]["cfg_scale"] == 1.0
    assert record["environment"]["torch"] == torch.__version__


def test_several_guidance_scales_load_the_weights_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gear_engine.cli import loading

    calls = []
    load = loading.load_models
    monkeypatch.setattr(loading, "load_models", lambda plan: calls.append(1) or load(plan))
    assert sample(checkpoint, tmp_path / "both", "--cfg-scale", "1", "3", count=2) == 0
    assert len(calls) == 1
    assert sample(checkpoint, tmp_path / "alone", "--cfg-scale", "3", count=2) == 0
    step = Path("exp") / "step0000007"
    assert files(tmp_path / "both" / step / "cfg3-temp1") == files(tmp_path / "alone" / step / "cfg3-temp1")
    assert not np.array_equal(
        pixels(tmp_path / "both" / step / "cfg1-temp1"), pixels(tmp_path / "both" / step / "cfg3-temp1")
    )


class Interrupt:
    """Raises KeyboardInterrupt in the given call of a run's drawing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
        from gear_engine.cli import sampling

        self.drawn: list[int] = []
        draw = sampling._Draw.__call__

        def counted(this: Any, indices: list[int]) -> np.ndarray:
            if self.calls == call:
                raise KeyboardInterrupt
            self.calls += 1
            self.drawn += indices
            return draw(this, indices)

        self.calls = 0
        monkeypatch.setattr(sampling._Draw, "__call__", counted)


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


@pytest.mark.parametrize("edge", [tiny.IMAGE_SIZE, 40])
def test_the_decoder_of_a_gpu(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edge: int) -> None:
    """Its steps are called here: the pixels of the CPU's decoder, five images in batches of two and resized ones."""
    resized = ("--image-size-eval", str(edge), "--decode-batch", "2")
    assert sample(checkpoint, tmp_path / "cpu", *resized) == 0
    made: list[DeviceDecoder] = []

    def choose(tokenizer: Tokenizer, dtype: torch.dtype, batch: int) -> DeviceDecoder:
        made.append(DeviceDecoder(tokenizer, dtype=dtype, batch=batch))
        return made[0]

    monkeypatch.setattr("gear_engine.tokenizers.choose_decoder", choose)
    assert sample(checkpoint, tmp_path / "gpu", *resized) == 0
    (decoder,) = made
    assert (decoder.dtype, decoder.batch) == (torch.float32, 2)
    assert len(decoder._programs) == (edge == tiny.IMAGE_SIZE), "resizing takes floats"
    ours, expected = (pixels(tmp_path / name / "exp" / "step0000007" / "cfg1-temp1") for name in ("gpu", "cpu"))
    assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1
    (run,) = (tmp_path / "gpu").rglob("run.json")
    assert json.loads(run.read_text())["settings"]["backend"]["decoder"] == "device"


def test_an_fp8_cache(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reaches the engine and the record; kernels that cannot read it are named, and nothing is written."""
    assert sample(checkpoint, tmp_path / "refused", "--cache-dtype", "fp8", "--backend", "cpu", count=1) == 2
    assert "float8_e4m3fn" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert sample(checkpoint, tmp_path, "--cache-dtype", "fp8", count=1) == 0
    (run,) = tmp_path.rglob("run.json")
    settings = json.loads(run.read_text())["settings"]
    assert (settings["cache_dtype"], settings["backend"]["decode_attention"]) == ("fp8", "reference")
    assert sample(checkpoint, tmp_path, count=1) == 2, "another cache is another run"


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


def test_labels_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"{i % tiny.NUM_CLASSES}\n" for i in range(3)))
    balanced, given = tmp_path / "balanced", tmp_path / "given"
    common = ["--ckpt-path", str(checkpoint), *FAST]
    assert main(["sample", *common, "--output-dir", str(balanced), "--labels", "balanced", "--fid-num", "3"]) == 0
    assert main(["sample", *common, "--output-dir", str(given), "--labels", str(path)]) == 0
    step = Path("exp") / "step0000007" / "cfg1-temp1"
    assert np.array_equal(pixels(balanced / step), pixels(given / step))


def test_resizing_is_said(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "--ckpt-path", str(checkpoint), "--output-dir", str(tmp_path), "--fid-num", "1"]
    assert main([*command, "--per-proc-batch-size", "1"]) == 0
    assert "resized from 64 to 256 pixels" in capsys.readouterr().out
    assert pixels(tmp_path / "exp" / "step0000007" / "cfg1-temp1").shape == (1, 256, 256, 3)


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


@pytest.mark.parametrize(("available", "named"), [(2_000_000, "lower --decode-batch"), (7_440_000, "max_images")])
def test_memory_is_planned_for_cache_and_decoder(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    named: str,
) -> None:
    """Two images decoded at once need 7.3 MB (7 maps of 64 x 64 x 32 floats each); the engine more than the rest."""
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


def test_the_unconditional_class_may_be_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text(f"{tiny.NUM_CLASSES}\n")
    assert sample(checkpoint, tmp_path / "out", "--labels", str(tmp_path / "labels.txt"), count=1) == 0


def test_a_text_model_is_sent_to_the_other_command(
    text_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(text_checkpoint, tmp_path / "out", count=1) == 2
    assert "sample-t2i" in capsys.readouterr().err
