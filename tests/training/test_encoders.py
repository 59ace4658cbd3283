"""Encoders of targets and perceptual distances, with random weights in the real formats; missing weights are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gear_engine.errors import CheckpointError, ConfigError, MissingWeightsError
from gear_engine.training import EncoderConfig, InitConfig, Trainer, train_small_encoder
from gear_engine.training.encoders import Dinov2Targets
from gear_engine.training.perceptual import SmallPerceptual, load_lpips
from tests.training.tiny import config, source

CONVOLUTIONS = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)]
CONVOLUTIONS += [(17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)]


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random weights under the names of torchvision's VGG-16 and of LPIPS 0.1."""
    folder = tmp_path_factory.mktemp("lpips")
    random = torch.Generator().manual_seed(0)
    vgg = {"classifier.0.weight": torch.zeros(2, 2)}
    for number, width, out in CONVOLUTIONS:
        vgg[f"features.{number}.weight"] = torch.randn(out, width, 3, 3, generator=random) * (2 / (9 * width)) ** 0.5
        vgg[f"features.{number}.bias"] = torch.randn(out, generator=random) * 0.1
    widths = (64, 128, 256, 512, 512)
    linear = {
        f"lin{level}.model.1.weight": torch.rand(1, width, 1, 1, generator=random) for level, width in enumerate(widths)
    }
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(linear, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


def test_lpips_is_its_definition(lpips_files: tuple[Path, Path]) -> None:
    net = load_lpips(*map(str, lpips_files))
    vgg, linear = (torch.load(path, weights_only=True) for path in lpips_files)
    random = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 3, 32, 32, generator=random) * 2 - 1 for _ in range(2))

    def maps(x: torch.Tensor) -> list[torch.Tensor]:
        h = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        found = []
        for number, _, _ in CONVOLUTIONS:
            if number in (5, 10, 17, 24):
                found.append(h)
                h = F.max_pool2d(h, 2)
            h = F.relu(F.conv2d(h, vgg[f"features.{number}.weight"], vgg[f"features.{number}.bias"], padding=1))
        return [*found, h]

    expected = 0.0
    for level, (x, y) in enumerate(zip(maps(a), maps(b), strict=True)):
        x, y = (m / (m.square().sum(1, keepdim=True).sqrt() + 1e-10) for m in (x, y))
        expected += F.conv2d((x - y).square(), linear[f"lin{level}.model.1.weight"]).mean((2, 3)).mean()
    torch.testing.assert_close(net(a, b), expected, rtol=1e-5, atol=0)
    b.requires_grad_(True)
    net(a, b).backward()
    assert b.grad.isfinite().all() and b.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net(a, a) == 0


def test_lpips_weights_that_are_missing_or_wrong(lpips_files: tuple[Path, Path], tmp_path: Path) -> None:
    vgg, linear = map(str, lpips_files)
    settings = config("tokenizer", loss={"perceptual": "lpips"})
    with pytest.raises(MissingWeightsError, match=r"loss\.lpips_vgg '' is not there.*set loss\.perceptual"):
        Trainer(settings, source(settings), device="cpu", write=False)
    with pytest.raises(MissingWeightsError, match=r"loss\.lpips_linear"):
        load_lpips(vgg, str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match="not the weights of LPIPS"):
        load_lpips(linear, linear)
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_lpips(str(tmp_path / "broken.pth"), linear)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dinov2")
    settings = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    torch.manual_seed(0)
    transformers.Dinov2Model(settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [-1, 1])
def test_dinov2_gives_one_feature_per_token(dinov2: Path, layer: int) -> None:
    from transformers import Dinov2Model

    encoder = Dinov2Targets(
        EncoderConfig(kind="dinov2", path=str(dinov2), layer=layer), grid=5, device=torch.device("cpu")
    )
    images = torch.randint(0, 256, (2, 3, 80, 80), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = encoder.targets(images)
    assert found.shape == (2, 25, 16) and encoder.dim == 16 and not found.requires_grad
    # 70 pixels are the grid that it was made for: the positions are as they were.
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images / 255.0 - mean[:, None, None]) / std[:, None, None]
    model = Dinov2Model.from_pretrained(dinov2)
    out = model(F.interpolate(pixels, 70, mode="bicubic"), output_hidden_states=True)
    expected = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    torch.testing.assert_close(found, expected[:, 1:], rtol=1e-5, atol=1e-5)
    other = Dinov2Targets(EncoderConfig(kind="dinov2", path=str(dinov2)), grid=8, device=torch.device("cpu"))
    assert other.targets(images).shape == (2, 64, 16)


def test_dinov2_weights_that_are_missing(dinov2: Path, tmp_path: Path) -> None:
    settings = config("joint", loss={"perceptual": "none"}, encoder={"kind": "dinov2", "path": str(tmp_path)})
    with pytest.raises(MissingWeightsError, match=r"no folder of DINOv2 weights.*encoder\.kind = 'small'"):
        Trainer(settings, source(settings), device="cpu", write=False)
    with pytest.raises(MissingWeightsError, match="beyond the 2 blocks"):
        Dinov2Targets(EncoderConfig(kind="dinov2", path=str(dinov2), layer=3), 5, torch.device("cpu"))


def test_a_small_encoder_learns_and_is_shared(tmp_path: Path) -> None:
    settings = config("tokenizer", tmp_path, steps=2, encoder={"steps": 60, "learning_rate": 3e-3})
    lines: list[dict] = []
    first = train_small_encoder(settings, source(settings), torch.device("cpu"), lines.append)
    assert lines[-1]["encoder_step"] == 60 and lines[-1]["encoder_accuracy"] == 1.0
    trainer = Trainer(settings, source(settings), device="cpu")
    again = trainer.state.encoder
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    list(trainer.run())
    stored = str(tmp_path / "checkpoints" / "0000002.pt")
    for changes in ({"init": InitConfig(tokenizer=stored)}, {"encoder": {"path": stored}}):
        joint = config("joint", **changes)
        taken = Trainer(joint, source(joint), device="cpu", write=False).state.encoder
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), taken.parameters(), strict=True))
    with pytest.raises(ConfigError, match="width 16"):
        joint = config("joint", encoder={"path": stored, "width": 24})
        Trainer(joint, source(joint), device="cpu", write=False)
    distance = SmallPerceptual(first)
    images = torch.rand(2, 3, 8, 8)
    assert distance(images, images) == 0 and distance(images, -images) > 0
