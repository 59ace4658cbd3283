"""Training images: order, augmentation and shares follow from the seed; wrong folders and arrays are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.runs.world import World
from gear_engine.training import ArraySource, DataConfig, FolderSource, open_source
from gear_engine.training.data import batches, share_of_step
from tests.training.tiny import config, pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of images of odd sizes and modes."""
    random = np.random.default_rng(0)
    for number, (name, shape) in enumerate({"a": (11, 17, 3), "b": (20, 9, 3), "c": (8, 8, 3)}.items()):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for image in range(4):
            pixels = random.integers(0, 256, shape).astype(np.uint8)
            picture = Image.fromarray(pixels).convert("L" if number == 2 else "RGB")
            picture.save(tmp_path / name / ("deeper" if image == 3 else ".") / f"{image}.png")
        (tmp_path / name / "notes.txt").write_text("no image")
    return tmp_path


def collect(source, settings, first: int, last: int, world: World | None = None) -> list:
    return list(batches(source, settings, world or World(), first, last))


def test_an_epoch_sees_every_image_once_and_processes_share_it() -> None:
    shares = [share_of_step(7, step, 13, 4, World()) for step in range(6)]
    for epoch in (shares[:3], shares[3:]):
        seen = np.concatenate([share.indices for share in epoch])
        assert len(set(seen)) == 12
    assert not np.array_equal(shares[0].indices, shares[3].indices)
    for step, whole in enumerate(shares):
        halves = [share_of_step(7, step, 13, 4, World(rank, 2)) for rank in range(2)]
        for name in whole._fields:
            joined = np.concatenate([getattr(half, name) for half in halves])
            assert np.array_equal(joined, getattr(whole, name))
    with pytest.raises(ConfigError, match="3 images do not fill a batch of 4"):
        share_of_step(0, 0, 3, 4, World())
    with pytest.raises(ConfigError, match="not divisible by the 3 processes"):
        share_of_step(0, 0, 9, 4, World(0, 3))


@pytest.mark.parametrize("crop", ["random", "center"])
def test_a_folder_is_read_as_the_official_loader_reads_it(folder: Path, crop: str) -> None:
    data = DataConfig(path=str(folder), image_size=8, crop=crop)
    source = open_source(data)
    assert isinstance(source, FolderSource)
    assert source.class_names == ["a", "b", "c"] and source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    settings = config("tokenizer", data=data, batch_size=3)
    share = share_of_step(settings.seed, 5, 12, 3, World())
    (batch,) = collect(source, settings, 5, 6)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (3, 3, 8, 8)
    for row, index in enumerate(share.indices):
        image = Image.open(source.paths[index]).convert("RGB")
        ratio = 8 / min(image.size)
        image = image.resize(tuple(int(edge * ratio + 1e-9) for edge in image.size), Image.Resampling.BICUBIC)
        spare = [image.height - 8, image.width - 8]
        place = [int(u * (s + 1)) for u, s in zip(share.places[row], spare, strict=True)]
        top, left = place if crop == "random" else [round(s / 2) for s in spare]
        expected = np.asarray(image)[top : top + 8, left : left + 8]
        expected = expected[:, ::-1] if share.flips[row] else expected
        assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), expected)
        assert batch.labels[row] == source.labels[index]


def test_workers_read_the_same_images(folder: Path) -> None:
    data = DataConfig(path=str(folder), image_size=8)
    alone = collect(open_source(data), config("tokenizer", data=data), 1, 5)
    helped = collect(
        open_source(data), config("tokenizer", data=DataConfig(path=str(folder), image_size=8, workers=2)), 1, 5
    )
    assert len(alone) == len(helped) == 4
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.drops, b.drops)


def test_arrays_and_files_of_them(tmp_path: Path) -> None:
    images, labels = pictures(12)
    data = DataConfig(path=str(tmp_path / "set.npz"), image_size=8)
    np.savez(tmp_path / "set.npz", images=images, labels=labels, class_names=["x", "y", "z"])
    source = open_source(data)
    assert isinstance(source, ArraySource) and source.class_names == ["x", "y", "z"]
    share = share_of_step(0, 2, 12, 4, World())
    found = source.read(share).permute(0, 2, 3, 1).numpy()
    for row, index in enumerate(share.indices):
        assert np.array_equal(found[row], images[index, :, ::-1] if share.flips[row] else images[index])
    channels_first = ArraySource.make(images.transpose(0, 3, 1, 2), labels, data)
    assert channels_first.fingerprint() == source.fingerprint()
    assert ArraySource.make(images, labels[::-1], data).fingerprint() != source.fingerprint()


def test_wrong_data_is_named(tmp_path: Path, folder: Path) -> None:
    images, labels = pictures(6)
    data = DataConfig(image_size=8)
    for wrong, match in (
        ((images.astype(np.float32), labels), "uint8"),
        ((images[:, :4], labels), "8, 8, 3"),
        ((images, labels[:5]), "labels must be integers"),
        ((images, labels - 1), "labels must be integers"),
        ((images, labels * 0.5), "labels must be integers"),
    ):
        with pytest.raises(ConfigError, match=match):
            ArraySource.make(*wrong, data)
    with pytest.raises(ConfigError, match="class names"):
        ArraySource.make(images, labels, data, ["one"])
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        open_source(data)
    with pytest.raises(ConfigError, match="no folder of classes"):
        open_source(DataConfig(path=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="no class folders"):
        open_source(DataConfig(path=str(folder / "a" / "deeper")))
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images"):
        open_source(DataConfig(path=str(folder)))
    (folder / "empty" / "broken.png").write_bytes(b"no image")
    settings = config("tokenizer", data=DataConfig(path=str(folder), image_size=8))
    with pytest.raises(InvalidRequestError, match=r"broken\.png"):
        collect(open_source(settings.data), settings, 0, 3)
    (tmp_path / "set.npz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"is no \.npz"):
        open_source(DataConfig(path=str(tmp_path / "set.npz")))
