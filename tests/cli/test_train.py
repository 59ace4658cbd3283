"""``gear-engine train``: from a folder of pictures and a TOML file to images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gear_engine.cli.main import main
from tests.training.tiny import pictures

STAGE0 = """
stage = "tokenizer"
steps = 2
batch_size = 4
[data]
path = "{folder}/pictures"
image_size = 8
[tokenizer]
family = "vq"
codebook_size = 16
codebook_embed_dim = 4
z_channels = 8
ch = 32
ch_mult = [1, 1]
num_res_blocks = 1
downsample = 2
[loss]
perceptual = "encoder"
discriminator_channels = 8
discriminator_layers = 1
[encoder]
kind = "small"
width = 16
steps = 2
batch_size = 4
[output]
folder = "{folder}/stage0"
"""
JOINT = STAGE0.replace('"tokenizer"', '"joint"').replace("stage0", "joint").replace("steps = 2\nb", "steps = 3\nb", 1)
JOINT += """checkpoint_every = 2
sample_every = 3
sample_count = 3
[init]
tokenizer = "{folder}/stage0/checkpoints/0000002.pt"
[generator]
dim = 16
n_layer = 2
n_head = 2
[alignment]
depth = 1
projector_dim = 16
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, labels = pictures(12)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "pictures" / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    for name, text in (("stage0", STAGE0), ("joint", JOINT)):
        (tmp_path / f"{name}.toml").write_text(text.replace("{folder}", str(tmp_path)))
    return tmp_path


def test_pictures_become_a_model_that_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(folder / "stage0.toml"), "--device", "cpu"]) == 0
    joint = ["train", "--config", str(folder / "joint.toml"), "--device", "cpu"]
    assert main(joint) == 0
    assert sorted(path.name for path in (folder / "joint" / "samples").iterdir()) == [
        "0000003-reconstructions.png",
        "0000003-samples.png",
    ]
    assert main(joint) == 2
    assert "resume it" in capsys.readouterr().err
    assert main([*joint, "--resume", "--steps", "4"]) == 0
    assert "step 4: checkpoints" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "joint" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4] and all(0 < line["codebook_usage"] <= 1 for line in lines)
    checkpoint = folder / "joint" / "checkpoints" / "0000004.pt"
    out = folder / "out"
    sample = ["sample", "--ckpt-path", str(checkpoint), "--output-dir", str(out), "--fid-num", "3"]
    assert main([*sample, "--labels", "balanced", "--image-size-eval", "8", "--cfg-scale", "2"]) == 0
    (archive,) = out.rglob("samples.npz")
    assert np.load(archive)["arr_0"].shape == (3, 8, 8, 3)


def test_requests_that_cannot_be_met(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "stage0.toml"
    assert main(["train", "--config", str(path), "--steps", "0"]) == 2
    path.write_text(path.read_text().replace('perceptual = "encoder"', 'perceptual = "lpips"'))
    assert main(["train", "--config", str(path), "--device", "cpu"]) == 2
    assert "loss.lpips_vgg" in capsys.readouterr().err
    assert not (folder / "stage0").exists()
