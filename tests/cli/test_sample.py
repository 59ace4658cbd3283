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
from gear_engine.cuda_graph import CaptureCost
from gear_engine.engine import Engine
from gear_engine.runs.labels import random_labels, text_hash
from gear_engine.tokenizers import DeviceDecoder, Tokenizer
from tests.cli import tiny
from tests.cli.sample_runs import FAST, Interrupt, files, pixels, sample


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


@pytest.mark.parametrize(("least", "warm"), [(5, ["philox"]), (6, [])])
def test_an_engine_is_warmed_up_for_many_images(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int, warm: list[str]
) -> None:
    seen: list[str] = []
    warm_up = Engine.warm_up

    def spy(engine: Engine, rng: Any = "philox") -> None:
        seen.append(rng)
        warm_up(engine, rng)

    monkeypatch.setattr(Engine, "warm_up", spy)
    monkeypatch.setattr("gear_engine.cli.sampling._WARM_UP_FROM", least)
    assert sample(checkpoint, tmp_path) == 0
    assert seen == warm


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


def test_the_unconditional_class_may_be_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text(f"{tiny.NUM_CLASSES}\n")
    assert sample(checkpoint, tmp_path / "out", "--labels", str(tmp_path / "labels.txt"), count=1) == 0


@pytest.mark.parametrize("edge", [tiny.IMAGE_SIZE, 40])
def test_the_decoder_of_a_gpu(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edge: int) -> None:
    """Its steps are called here: the pixels of the CPU's decoder, five images in batches of two and resized ones."""
    resized = ("--image-size-eval", str(edge), "--decode-batch", "2")
    assert sample(checkpoint, tmp_path / "cpu", *resized) == 0
    made: list[DeviceDecoder] = []

    def choose(tokenizer: Tokenizer, dtype: torch.dtype, batch: int, backend: Any) -> DeviceDecoder:
        made.append(DeviceDecoder(tokenizer, dtype=dtype, batch=batch, backend=backend))
        return made[0]

    monkeypatch.setattr("gear_engine.tokenizers.choose_decoder", choose)
    norms = ("--backend", "group_norm_silu=reference")
    assert sample(checkpoint, tmp_path / "gpu", *resized, *norms) == 0
    (decoder,) = made
    assert (decoder.dtype, decoder.batch) == (torch.float32, 2)
    assert len(decoder._programs) == 1
    ours, expected = (pixels(tmp_path / name / "exp" / "step0000007" / "cfg1-temp1") for name in ("gpu", "cpu"))
    assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1
    (run,) = (tmp_path / "gpu").rglob("run.json")
    recorded = json.loads(run.read_text())["settings"]["backend"]
    assert recorded["decoder"] == "device"
    assert recorded["group_norm_silu"] == "reference"
    assert recorded["residual_moments"] == decoder.backends["residual_moments"]


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_a_gpu_decodes_beside_the_next_rollout(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: str
) -> None:
    """Batch n goes to the decoder before batch n + 1 is drawn, and is waited for after; nothing else changes.

    The decoder works when it is waited for, as late as it may: what it reads must still be there.
    """
    assert sample(checkpoint, tmp_path / "cpu", "--rng", rng) == 0
    events: list[str] = []
    generate = Engine.generate

    class Side:
        def run(self, work: Callable[[], None], tokens: torch.Tensor) -> Callable[[], None]:
            events.append("decode")

            def wait() -> None:
                events.append("wait")
                work()

            return wait

    def choose(tokenizer: Tokenizer, dtype: torch.dtype, batch: int, backend: Any) -> DeviceDecoder:
        return DeviceDecoder(tokenizer, dtype=dtype, batch=batch, side=Side())

    def draw(engine: Engine, *arguments: Any, **options: Any) -> torch.Tensor:
        events.append("draw")
        return generate(engine, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("gear_engine.tokenizers.choose_decoder", choose)
        patch.setattr(Engine, "generate", draw)
        assert sample(checkpoint, tmp_path / "gpu", "--rng", rng) == 0
        assert events == ["draw", "decode", "draw", "decode", "wait", "draw", "decode", "wait", "wait"]
        Interrupt(patch, call=2)
        assert sample(checkpoint, tmp_path / "broken", "--rng", rng) == 130
    ours, expected, broken = (
        tmp_path / name / "exp" / "step0000007" / "cfg1-temp1" for name in ("gpu", "cpu", "broken")
    )
    assert np.abs(pixels(ours).astype(int) - pixels(expected).astype(int)).max() <= 1
    assert files(broken / "samples").items() < files(ours / "samples").items()
    assert len(files(broken / "samples")) == 4, "what was being decoded reaches the folder"


def test_an_fp8_cache(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reaches the engine and the record; kernels that cannot take it are named, and nothing is written."""
    refused = ("--cache-dtype", "fp8", "--dtype", "fp16", "--backend", "decode_attention=cpu")
    assert sample(checkpoint, tmp_path / "refused", *refused, count=1) == 2
    assert "not float16" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert sample(checkpoint, tmp_path, "--cache-dtype", "fp8", count=1) == 0
    (run,) = tmp_path.rglob("run.json")
    settings = json.loads(run.read_text())["settings"]
    assert (settings["cache_dtype"], settings["backend"]["decode_attention"]) == ("fp8", "cpu")
    assert sample(checkpoint, tmp_path, count=1) == 2, "another cache is another run"


def test_what_capturing_took_is_recorded(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; nothing is captured on a CPU, and nothing said about it. A resumed run is not compared with it."""
    record = tmp_path / "exp" / "step0000007" / "cfg1-temp1" / "run.json"
    assert sample(checkpoint, tmp_path, count=1) == 0
    assert set(json.loads(record.read_text())) == {"settings", "environment"}
    (record.parent / "samples.npz").unlink()
    monkeypatch.setattr(Engine, "capture_cost", CaptureCost(1.25, 4096))
    assert sample(checkpoint, tmp_path, count=1) == 0
    assert json.loads(record.read_text())["measured"] == {"capture": {"generator": {"seconds": 1.25, "bytes": 4096}}}
    (record.parent / "samples.npz").unlink()
    assert sample(checkpoint, tmp_path, count=1) == 0
