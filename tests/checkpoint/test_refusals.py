"""Files that must not load: each is refused with an error that says what is wrong, and nothing in it runs."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import struct
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.checkpoint import read_generator, read_tokenizer
from gear_engine.errors import CheckpointError, UnsafeCheckpointError
from tests.checkpoint import files
from tests.checkpoint.files import GENERATOR, HEADS
from tests.checkpoint.refusals import STATE, Payload, refused, save


# -- code ------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["root", "args", "state", "bare pickle", "legacy"])
def test_code_is_refused_and_does_not_run(tmp_path: Path, place: str) -> None:
    sentinel, path = tmp_path / "ran", tmp_path / "checkpoint.pt"
    payload = Payload(sentinel)
    root: Any = {"root": payload, "args": files.stage2(args=payload), "state": {"model": {**STATE, "x": payload}}}
    if place == "bare pickle":
        path.write_bytes(pickle.dumps(payload))
        refused(path, "bare pickle", UnsafeCheckpointError)
    elif place == "legacy":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
        refused(path, r"torch before 1\.6; save it again")
    else:
        torch.save(root[place], path)
        refused(path, r"names '(posix|nt)\.system'.*nothing was run", UnsafeCheckpointError)
    assert not sentinel.exists()
    if place != "legacy":  # The payload is a real one.
        torch.load(path, weights_only=False) if place != "bare pickle" else pickle.loads(path.read_bytes())
        assert sentinel.exists()


def test_only_one_class_is_admitted(tmp_path: Path) -> None:
    class_args = {"args": argparse.Namespace(image_size=8, downsample_size=2)}
    assert read_generator(files.save(tmp_path / "a", {"model": STATE, **class_args}), **HEADS).config == GENERATOR
    for value in (Path("x"), collections.deque([1]), argparse.ArgumentParser):
        refused(files.save(tmp_path / "b", {"model": STATE, "extra": value}), "names", UnsafeCheckpointError)


def test_a_torchscript_program(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    refused(path, "TorchScript", UnsafeCheckpointError)


# -- files that are no checkpoints -------------------------------------------------
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"hello, this is no checkpoint at all\n", "not a checkpoint"),
        (b"PK", "not a checkpoint"),
        (b"PK\x03\x04", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (struct.pack("<Q", 2**40) + b"{", "not a checkpoint"),
        (struct.pack("<Q", 2) + b"{}", "no generator"),
        (b"\0" * 300, "not a checkpoint"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    refused(path, match)


def test_folders_missing_files_and_pipes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        read_generator(tmp_path)
    refused(tmp_path / "absent.pt", "No such file")
    with pytest.raises(CheckpointError, match="pin its revision"):
        read_generator("some-org/some-model")
    for name in ("x" * 5000, f"{tmp_path}/{'x' * 300}/checkpoint.pt", "a\0b"):
        with pytest.raises(CheckpointError, match=r"too long|null"):
            read_generator(name)
        with pytest.raises(CheckpointError, match=r"too long|null"):
            read_tokenizer(name)
    os.mkfifo(tmp_path / "pipe")
    worker = threading.Thread(target=refused, args=(tmp_path / "pipe", "not a regular file"), daemon=True)
    worker.start()
    worker.join(10)
    assert not worker.is_alive()


def test_every_truncation(tmp_path: Path) -> None:
    path = save(tmp_path, STATE)
    data = path.read_bytes()
    for length in (*range(0, len(data), 997), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_generator(path, **HEADS)


def test_a_flipped_weight_bit_is_detected(tmp_path: Path) -> None:
    path = save(tmp_path, STATE)
    data = bytearray(path.read_bytes())
    weight = STATE["layers.1.feed_forward.w1.weight"].numpy().tobytes()
    data[data.index(weight) + 100] ^= 4
    path.write_bytes(data)
    refused(path, "checksum")


def test_a_file_without_checksums_is_read_and_said_to_be(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, STATE)
    finally:
        torch.serialization.set_crc32_options(True)
    _, state, source = read_generator(path, **HEADS)
    assert files.equal(state, STATE)
    assert not source.verified


def test_compressed_records_are_not_inflated(tmp_path: Path) -> None:
    path = save(tmp_path, STATE)
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in found.items():
            archive.writestr(name, data)
        archive.writestr("checkpoint/data/999", bytes(100 << 20))
    assert path.stat().st_size < 1 << 20
    refused(path, "compressed", UnsafeCheckpointError)


# -- tensors -----------------------------------------------------------------------
def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = dict(STATE)
    del state["layers.2.attention.wo.weight"]
    refused(save(tmp_path, state), r"missing 'layers\.2\.attention\.wo\.weight'")
    refused(save(tmp_path, {**STATE, "layers.0.bias": torch.zeros(3)}), r"unknown 'layers\.0\.bias'")
    refused(save(tmp_path, {**STATE, "norm.weight": torch.ones(47)}), "47")
    del state["layers.2.attention.wqkv.weight"], state["layers.2.ffn_norm.weight"]
    refused(save(tmp_path, state), r"layers\.2\.attention\.wqkv\.weight.*layers\.2\.ffn_norm\.weight")
    without_layer = {name: tensor for name, tensor in STATE.items() if not name.startswith("layers.1.")}
    refused(save(tmp_path, without_layer), r"layers\.1 is missing")


@pytest.mark.parametrize(
    "name", [name for name in STATE if STATE[name].dim() == 2 and len(set(STATE[name].shape)) == 2]
)
def test_one_transposed_tensor(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, {**STATE, name: STATE[name].t().contiguous()})
    rows, columns = STATE[name].shape
    refused(path, rf"{name}' has shape {columns} x {rows}.*{rows} x {columns}.*transposed")


def test_a_transposed_codebook(tmp_path: Path) -> None:
    state = files.tokenizer_state()
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"].t().contiguous()
    with pytest.raises(CheckpointError, match=r"quantize\.embedding\.weight' has shape 4 x 64; expected 64 x 4"):
        read_tokenizer(files.save(tmp_path / "vq.pt", {"model": state}))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype).clone() for name, tensor in STATE.items()}
    state["layers.1.attention.wo.weight"][5, 3] = value
    refused(save(tmp_path, state), r"'layers\.1\.attention\.wo\.weight' holds 1 numbers that are not finite")


def test_numbers_that_a_smaller_dtype_cannot_hold(tmp_path: Path) -> None:
    state = {**STATE, "norm.weight": torch.full((48,), 1e6)}
    refused(save(tmp_path, state), "too large for torch.float16", dtype=torch.float16)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "qtensor|QInt8"),
        (lambda t: t.to("meta"), "meta"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.int(), "int32"),
        (lambda t: t.to(torch.float8_e4m3fn), "float8"),
        (lambda t: [1.0, 2.0], "list"),
        (lambda t: None, "NoneType"),
        (lambda t: 0.5, "float"),
        (lambda t: t[:0], "empty|shape"),
        (lambda t: t[:1].expand(48, 48), "repeats"),
        (lambda t: torch.zeros(1).as_strided((48, 48), (0, 0)), "repeats"),
    ],
)
def test_entries_that_are_no_plain_tensors(tmp_path: Path, make: Any, match: str) -> None:
    name = "layers.0.attention.wo.weight"
    path = save(tmp_path, {**STATE, name: make(STATE[name])})
    with pytest.raises(CheckpointError, match=rf"(?s){match}"):
        read_generator(path, **HEADS)
