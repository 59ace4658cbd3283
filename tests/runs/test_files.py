"""Whole files or none."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gear_engine.errors import CheckpointError
from gear_engine.files import atomic_file, content_hash, remove_temporaries, write_atomic
from gear_engine.runs.npz import write_npz
from gear_engine.runs.png import png_size, read_png, write_png


def noise(seed: int, height: int = 9, width: int = 13) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a.bin", b"x" * 100)
    assert not list(tmp_path.iterdir())


def test_temporaries_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".000001.png.4242.tmp").write_bytes(b"half")
    write_atomic(tmp_path / "kept.png", b"x")
    remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.png"]


def test_content_hash(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"weights")
    assert content_hash(tmp_path / "a.pt") == hashlib.sha256(b"weights").hexdigest()
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="folder without"):
        content_hash(folder)
    (folder / "config.json").write_text("{}")
    one = content_hash(folder)
    (folder / "generator.safetensors").write_bytes(b"w")
    two = content_hash(folder)
    (folder / "generator.safetensors").rename(folder / "tokenizer.safetensors")
    assert len({one, two, content_hash(folder)}) == 3
    with pytest.raises(CheckpointError, match="cannot read"):
        content_hash(tmp_path / "absent.pt")


def test_png_round_trip(tmp_path: Path) -> None:
    image = noise(0)
    write_png(tmp_path / "a.png", image)
    assert png_size(tmp_path / "a.png") == (9, 13)
    assert np.array_equal(read_png(tmp_path / "a.png"), image)
    with pytest.raises(ValueError, match="uint8"):
        write_png(tmp_path / "b.png", image.astype(np.float32))


def test_every_truncation_and_damage_of_a_png_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, noise(1, 4, 5))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert png_size(path) is None, length
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        assert png_size(path) is None, position
    path.write_bytes(whole + b"tail")
    assert png_size(path) is None
    assert png_size(tmp_path / "absent.png") is None


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_pixel_formats_do_not_count(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") is None


def test_npz_is_what_numpy_reads(tmp_path: Path) -> None:
    images = [noise(i, 5, 7) for i in range(4)]
    assert write_npz(tmp_path / "samples.npz", iter(images), 4) == (4, 5, 7, 3)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], np.stack(images))
    first = (tmp_path / "samples.npz").read_bytes()
    write_npz(tmp_path / "samples.npz", iter(images), 4)
    assert (tmp_path / "samples.npz").read_bytes() == first


@pytest.mark.parametrize("count", [0, 3, 5])
def test_npz_with_a_wrong_count_is_not_written(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match="images"):
        write_npz(tmp_path / "samples.npz", (noise(i) for i in range(4)), count)
    assert not list(tmp_path.iterdir())


def test_npz_holds_one_image_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    tracemalloc.start()
    write_npz(tmp_path / "samples.npz", (noise(i, 128, 128) for i in range(100)), 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000 < (tmp_path / "samples.npz").stat().st_size
