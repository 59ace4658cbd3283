"""gear-engine sample-t2i, with precomputed features and with a tiny text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gear_engine.cli.main import main
from gear_engine.models.transformer import Transformer
from gear_engine.tokenizers import build_tokenizer, to_uint8
from tests.cli import tiny
from tests.golden_weights import golden_noise, golden_state_dict
from tests.plain_generator import PlainTransformer, plain_generate

COUNT = 3
LENGTH = tiny.TEXT_GENERATOR.cls_token_num
WIDTH = tiny.TEXT_GENERATOR.caption_dim


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "captions.safetensors"
    lengths = torch.tensor([LENGTH, 2, 4])
    save_file(
        {
            "states": golden_noise("captions", (COUNT, LENGTH, WIDTH)),
            "mask": (torch.arange(LENGTH) < lengths[:, None]).to(torch.uint8),
            "uncond_states": golden_noise("empty caption", (LENGTH, WIDTH)),
            "uncond_mask": (torch.arange(LENGTH) < 1).to(torch.uint8),
        },
        path,
    )
    return path


def sample(checkpoint: Path, output: Path, *flags: str) -> int:
    command = ["sample-t2i", "--ckpt-path", str(checkpoint), "--output-dir", str(output), "--device", "cpu"]
    return main([*command, "--exp-name", "exp", "--per-proc-batch-size", "2", *flags])


def run_folder(output: Path, sampling: str) -> Path:
    return output / "exp" / "step0000009" / sampling


def pixels(run: Path) -> np.ndarray:
    with np.load(run / "samples.npz") as archive:
        return np.asarray(archive["arr_0"])


def official_pixels(features: dict[str, torch.Tensor], batch: int, seed: int, cfg_scale: float) -> np.ndarray:
    """The official program on one process: batches in order, the last one short, one global generator."""
    config = tiny.TEXT_GENERATOR
    model = PlainTransformer(config).eval()
    model.load_state_dict(golden_state_dict(Transformer(config)))
    tokenizer = build_tokenizer(tiny.TOKENIZER)
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    images = []
    torch.manual_seed(seed)
    for start in range(0, COUNT, batch):
        states = features["states"][start : start + batch]
        mask = features["mask"][start : start + batch] != 0
        tokens = plain_generate(
            model,
            states,
            config.block_size,
            uncond=features["uncond_states"].expand_as(states),
            mask=mask,
            uncond_mask=(features["uncond_mask"] != 0).expand_as(mask),
            cfg_scale=cfg_scale,
        )
        with torch.no_grad():
            images.append(to_uint8(tokenizer.decode_code(tokens, (len(states), 8, 4, 4))))
    return torch.cat(images).numpy()


def test_torch_gives_the_official_images(text_checkpoint: Path, features: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    flags = ["--features", str(features), "--rng", "torch", "--seed", "3", "--cfg-scale", "2"]
    assert sample(text_checkpoint, tmp_path, *flags) == 0
    expected = official_pixels(load_file(features), batch=2, seed=3, cfg_scale=2.0)
    found = pixels(run_folder(tmp_path, "cfg2-temp1"))
    assert found.shape == (COUNT, 64, 64, 3)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_philox_images_depend_on_no_batch(text_checkpoint: Path, features: Path, tmp_path: Path) -> None:
    for name, batch in (("one", "1"), ("three", "3")):
        flags = ["--features", str(features), "--cfg-scale", "2", "--per-proc-batch-size", batch]
        assert sample(text_checkpoint, tmp_path / name, *flags) == 0
    one, three = (pixels(run_folder(tmp_path / name, "cfg2-temp1")) for name in ("one", "three"))
    assert np.array_equal(one, three)


def test_other_features_are_refused(
    text_checkpoint: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(text_checkpoint, tmp_path, "--features", str(features), "--num", "1") == 0
    other = tmp_path / "other.safetensors"
    save_file({"states": golden_noise("others", (COUNT, LENGTH, WIDTH))}, other)
    assert sample(text_checkpoint, tmp_path, "--features", str(other), "--num", "1") == 2
    assert "captions.features_sha256" in capsys.readouterr().err


def test_without_an_npz(text_checkpoint: Path, features: Path, tmp_path: Path) -> None:
    assert sample(text_checkpoint, tmp_path, "--features", str(features), "--no-pack-npz", "--num", "2") == 0
    run = run_folder(tmp_path, "cfg1-temp1")
    assert sorted(p.name for p in run.iterdir()) == ["run.json", "samples"]
    assert len(list((run / "samples").iterdir())) == 2


class TinyEncoder:
    """Stands in for a text tower: states follow from the caption's characters."""

    max_length = LENGTH
    hidden_size = WIDTH

    def __init__(self, kind: str = "qwen", dtype: torch.dtype = torch.float32) -> None:
        self.kind = kind
        self.dtype = dtype

    def encode(self, prompts: list[str], *, batch_size: int) -> Any:
        from gear_engine.text_encoders import CaptionFeatures

        states = torch.stack([golden_noise(prompt, (LENGTH, WIDTH)) for prompt in prompts])
        lengths = torch.tensor([min(len(prompt), LENGTH) for prompt in prompts])
        return CaptionFeatures(states, torch.arange(LENGTH) < lengths[:, None])


def test_prompts_go_through_the_encoder(text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gear_engine import text_encoders

    asked: list[tuple[str, dict[str, Any]]] = []

    def load(name: str, **options: Any) -> TinyEncoder:
        asked.append((name, options))
        return TinyEncoder()

    monkeypatch.setattr(text_encoders, "load_text_encoder", load)
    prompts = tmp_path / "prompts.jsonl"
    captions = ["a red fox", "rain", "x"]
    prompts.write_text("".join(json.dumps({"key": str(i), "caption": c}) + "\n" for i, c in enumerate(captions)))
    flags = ["--prompts-jsonl", str(prompts), "--text-encoder", "towers/tiny"]
    assert sample(text_checkpoint, tmp_path / "prompts", *flags) == 0
    assert asked[0][0] == "towers/tiny"
    assert asked[0][1]["max_length"] == LENGTH
    encoded = TinyEncoder().encode(captions, batch_size=1)
    path = tmp_path / "f.safetensors"
    save_file({"states": encoded.states, "mask": encoded.mask.to(torch.uint8)}, path)
    assert sample(text_checkpoint, tmp_path / "features", "--features", str(path)) == 0
    one, two = (pixels(run_folder(tmp_path / name, "cfg1-temp1")) for name in ("prompts", "features"))
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("trained", "flags", "expected"),
    [
        ({}, [], torch.bfloat16),
        ({"mixed_precision": "bf16"}, [], torch.bfloat16),
        ({"mixed_precision": "fp16"}, [], torch.float16),
        ({"mixed_precision": "no"}, [], torch.float32),
        ({"mixed_precision": "no"}, ["--text-dtype", "bf16"], torch.bfloat16),
    ],
)
@pytest.mark.parametrize("converted", [False, True])
def test_the_encoder_runs_in_the_trainings_precision(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: dict[str, str],
    flags: list[str],
    expected: torch.dtype,
    converted: bool,
) -> None:
    from gear_engine import text_encoders
    from gear_engine.checkpoint.conversion import run_job

    asked: list[tuple[str, torch.dtype]] = []

    def load(name: str, *, dtype: torch.dtype, **_: Any) -> TinyEncoder:
        asked.append((name, dtype))
        return TinyEncoder()

    monkeypatch.setattr(text_encoders, "load_text_encoder", load)
    path = tiny.stage1(tmp_path / "exp" / "text.pt", tiny.TEXT_GENERATOR, text_encoder="towers/saved", **trained)
    if converted:
        folder = tmp_path / "converted"
        overrides: dict[str, Any] = {"generator_overrides": {}, "tokenizer_overrides": {}}
        job = {"source": path, "folder": folder, "tokenizer": None, "ema": True, "generator_only": False, **overrides}
        run_job(job)
        path = folder
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"caption": "x"}\n')
    assert sample(path, tmp_path / "out", "--prompts-jsonl", str(prompts), *flags) == 0
    assert asked == [("towers/saved", expected)]


def test_an_encoder_of_the_other_kind_is_refused(
    text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen3-1.7B and flan-t5-xl have states of the same width: only their kind tells them apart."""
    from gear_engine import text_encoders

    monkeypatch.setattr(text_encoders, "load_text_encoder", lambda name, **_: TinyEncoder("t5"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"caption": "x"}\n')
    flags = ["--prompts-jsonl", str(prompts), "--text-encoder", "towers/t5"]
    assert sample(text_checkpoint, tmp_path / "out", *flags) == 2
    assert "towers/t5 is a t5 encoder, but the model is GEAR's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--prompts-jsonl"),
        (["--features", "{features}", "--prompts-jsonl", "{features}"], "--prompts-jsonl"),
        (["--prompts-jsonl", "absent.jsonl"], "cannot read prompts"),
        (["--features", "absent.safetensors"], "cannot read features"),
        (["--features", "{features}", "--num", "-1"], "must not be negative"),
        (["--features", "{features}", "--text-encoder", "x"], "--text-encoder has no meaning with --features"),
        (["--features", "{features}", "--text-dtype", "fp32"], "--text-dtype has no meaning with --features"),
        (["--prompts-jsonl", "{prompts}"], "--text-encoder"),
        (["--prompts-jsonl", "{prompts}", "--text-encoder", "/nowhere", "--text-max-len", "5"], "text-max-len"),
        (["--prompts-jsonl", "{prompts}", "--text-encoder", "/nowhere"], "text encoder"),
        (["--features", "{features}", "--cls-token-num", "7"], "7"),
        (["--features", "{wide}"], "caption"),
    ],
)
def test_bad_input_is_refused(
    text_checkpoint: Path,
    features: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"caption": "x"}\n')
    save_file({"states": torch.zeros(1, LENGTH, WIDTH + 1)}, tmp_path / "wide.safetensors")
    places = {"features": features, "prompts": tmp_path / "prompts.jsonl", "wide": tmp_path / "wide.safetensors"}
    assert sample(text_checkpoint, tmp_path / "out", *[flag.format(**places) for flag in flags]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_a_class_model_is_sent_to_the_other_command(
    checkpoint: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(checkpoint, tmp_path / "out", "--features", str(features)) == 2
    assert "gear-engine sample" in capsys.readouterr().err
