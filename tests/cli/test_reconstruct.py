"""gear-engine reconstruct."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gear_engine.cli.main import main
from gear_engine.cli.pictures import labelled_grid
from gear_engine.cli.reconstruct import reconstruct_image
from gear_engine.config import TokenizerConfig
from gear_engine.metrics import codebook_usage, l1, psnr, ssim
from gear_engine.tokenizers import Tokenizer, build_tokenizer, to_uint8
from tests.cli import tiny
from tests.golden_weights import golden_state_dict


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = build_tokenizer(tiny.TOKENIZER)
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    return tokenizer


@torch.no_grad()
def test_a_fitting_image_goes_straight_through(tokenizer: Tokenizer) -> None:
    image = picture(0, 32, 48)
    restored, codes = reconstruct_image(tokenizer, image)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    quant, _, info = tokenizer.encode(x)
    assert torch.equal(codes, info[2].flatten())
    expected = to_uint8(tokenizer.decode_code(info[2], quant.shape))[0].numpy()
    assert np.abs(restored.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 16), (16, 17), (37, 50), (15, 64)])
def test_any_size_comes_back(tokenizer: Tokenizer, height: int, width: int) -> None:
    image = picture(1, height, width)
    restored, codes = reconstruct_image(tokenizer, image)
    assert restored.shape == image.shape
    columns = 2 if max(height, width) <= 16 else -(-width // 16)
    assert codes.numel() == -(-height // 16) * columns
    padded = np.pad(image, ((0, -height % 16), (0, columns * 16 - width), (0, 0)), mode="edge")
    whole, _ = reconstruct_image(tokenizer, padded)
    assert np.array_equal(restored, whole[:height, :width])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 16), (5, 37)])
def test_lookup_free_tokenizers(height: int, width: int, groups: int) -> None:
    """A latent of one position has no variance to normalise by; several groups give several codes per position."""
    config = TokenizerConfig(
        family="lfq", codebook_size=2**8, codebook_embed_dim=8, z_channels=8, num_codebooks=groups, ch=32,
        ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, codebook_l2_norm=False,
    )  # fmt: skip
    tokenizer = build_tokenizer(config)
    tokenizer.load_state_dict(golden_state_dict(tokenizer))
    image = picture(4, height, width)
    restored, codes = reconstruct_image(tokenizer, image)
    assert restored.shape == image.shape
    assert codes.numel() == groups * max(2, -(-width // 16))
    assert codebook_usage(codes, tokenizer.quantize.num_codes).num_codes == 2 ** (8 // groups)


def test_16_bit_images_keep_their_tones(checkpoint: Path, tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 16 * 32).astype(np.uint16).reshape(16, 32)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    command = ["reconstruct", "--tokenizer", str(checkpoint), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, str(tmp_path / "deep.png")]) == 0
    with Image.open(tmp_path / "out" / "0000-deep.png") as both:
        shown = np.asarray(both)[4:20, 4:36]
    assert np.abs(shown - (grey / 257)[:, :, None]).max() <= 0.5
    assert main([*command, str(tmp_path / "float.tif")]) == 2


def test_pictures_table_and_json(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    images = [picture(2, 32, 32), picture(3, 20, 45)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"photo{index}.png")
    gray = tmp_path / "gray.png"
    Image.new("L", (8, 8), 90).save(gray)
    output = tmp_path / "out"
    command = ["reconstruct", str(folder), str(gray), "--tokenizer", str(checkpoint), "--output-dir", str(output)]
    assert main([*command, "--device", "cpu"]) == 0
    report = json.loads((output / "metrics.json").read_text())
    assert [Path(row["image"]).name for row in report["images"]] == ["photo0.png", "photo1.png", "gray.png"]
    with Image.open(output / "0001-photo1.png") as both:
        shown = np.asarray(both)
    assert np.array_equal(shown[4:24, 4:49], images[1])
    label_width = shown.shape[1] - 3 * 4
    restored = shown[4:24, 4 + label_width // 2 + 4 :][:, :45]
    a, b = torch.from_numpy(images[1])[None], torch.from_numpy(restored.copy())[None]
    row = report["images"][1]
    assert [row["psnr"], row["ssim"], row["l1"]] == pytest.approx(
        [float(psnr(a, b)), float(ssim(a, b)), float(l1(a, b))]
    )
    assert report["images"][2]["ssim"] is None
    assert report["mean"]["psnr"] == pytest.approx(sum(row["psnr"] for row in report["images"]) / 3)
    assert report["codebook"]["num_codes"] == 64
    assert report["codebook"]["num_indices"] == 4 + 6 + 2
    table = capsys.readouterr().out
    assert "photo1.png" in table
    assert f"{row['psnr']:.2f}" in table
    assert "codes used" in table


def test_codebook_usage_is_counted_over_all_images(tokenizer: Tokenizer) -> None:
    codes = [reconstruct_image(tokenizer, picture(seed, 32, 32))[1] for seed in range(3)]
    usage = codebook_usage(torch.cat(codes), tokenizer.quantize.num_codes)
    assert usage.num_used == len(set(torch.cat(codes).tolist()))


@pytest.mark.parametrize("kind", ["absent image", "text image", "empty folder", "absent tokenizer", "text tokenizer"])
def test_bad_input_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    image, tokenizer = tmp_path / "a.png", checkpoint
    Image.fromarray(picture(0, 16, 16)).save(image)
    if kind == "absent image":
        image = tmp_path / "b.png"
    elif kind == "text image":
        image.write_text("no image")
    elif kind == "empty folder":
        image = tmp_path / "empty"
        image.mkdir()
    elif kind == "absent tokenizer":
        tokenizer = tmp_path / "absent.pt"
    else:
        tokenizer = tmp_path / "text.pt"
        tokenizer.write_text("no weights")
    command = ["reconstruct", str(image), "--tokenizer", str(tokenizer), "--output-dir", str(tmp_path / "out")]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert "error:" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_a_grid_places_images_of_any_size() -> None:
    images = [picture(0, 10, 12), picture(1, 20, 8), picture(2, 5, 5)]
    grid = np.asarray(labelled_grid(images, ["a", "b", "c"], columns=2))
    width, height = 12, 20 + 16
    assert grid.shape == (4 + 2 * (height + 4), 4 + 2 * (width + 4), 3)
    assert np.array_equal(grid[4:14, 4:16], images[0])
    assert np.array_equal(grid[4:24, 20:28], images[1])
    assert np.array_equal(grid[44:49, 4:9], images[2])
    with pytest.raises(ValueError, match="no grid"):
        labelled_grid(images, ["a"], columns=2)
