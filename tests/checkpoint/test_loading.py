"""How weights get from the file into a module: views of storages, and what loading must not drag in."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from gear_engine.checkpoint import load_generator, load_tokenizer, open_generator, read_generator, save_pretrained
from gear_engine.errors import CheckpointError, UnsafeCheckpointError
from gear_engine.hub import local_path
from tests.checkpoint import files
from tests.checkpoint.files import HEADS
from tests.checkpoint.refusals import STATE, refused, save


def test_views_of_one_storage(tmp_path: Path) -> None:
    """Tied tensors, slices of one buffer and transposed views load; overlapping ones would multiply memory."""
    buffer = torch.cat([tensor.flatten() for tensor in STATE.values()])
    parts = buffer.split([tensor.numel() for tensor in STATE.values()])
    sliced = {name: part.view(STATE[name].shape) for name, part in zip(STATE, parts, strict=True)}
    assert files.equal(read_generator(save(tmp_path, sliced), **HEADS).state, STATE)
    turned = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in STATE.items()}
    found = read_generator(save(tmp_path, turned), **HEADS).state
    assert files.equal(found, STATE)
    assert all(tensor.is_contiguous() for tensor in found.values())
    tied = {**STATE, "output.weight": STATE["tok_embeddings.weight"]}
    assert files.equal(read_generator(save(tmp_path, tied), **HEADS).state, tied)
    overlapping = {**STATE, "norm.weight": buffer[:48], "layers.0.ffn_norm.weight": buffer[1:49]}
    refused(save(tmp_path, overlapping), "overlap", UnsafeCheckpointError)


def test_the_first_load_does_not_import_the_compiler(tmp_path: Path) -> None:
    """torch._dynamo takes seconds to import, and initialising a module on the meta device pulls it in."""
    path = save(tmp_path, STATE)
    code = (
        "import sys; from gear_engine.checkpoint import load_generator; "
        f"load_generator({str(path)!r}, n_head=4); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    module, _ = open_generator(path, **HEADS)
    assert not any(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols_parameters_and_module_state_dicts(tmp_path: Path, protocol: int) -> None:
    module = load_generator(save(tmp_path, STATE), **HEADS)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()}
    extras = {
        "bytes": b"abc",
        "set": {1, 2},
        "size": torch.Size([1]),
        "dtype": torch.float32,
        "big": 2**70,
        "inf": 1e400,
    }
    root = {"ar": parameters, "ema": module.state_dict(), "args": {**files.ARGS, **extras}}
    path = tmp_path / "checkpoint.pt"
    torch.save(root, path, pickle_protocol=protocol)
    assert files.equal(read_generator(path, **HEADS).state, STATE)
    assert files.equal(read_generator(path, ema=False, **HEADS).state, STATE)


def test_messages_stay_short(tmp_path: Path) -> None:
    path = save(tmp_path, {**STATE, "x" * 100_000: STATE["norm.weight"]})
    with pytest.raises(CheckpointError) as caught:
        read_generator(path, **HEADS)
    assert len(str(caught.value)) < 4000


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        return str(tmp_path)

    def hf_hub_download(repo: str, file: str, *, revision: str) -> str:
        asked.append((repo, file, revision))
        if file == "absent.pt":
            raise OSError("404")
        return str(save(tmp_path, STATE))

    hub = types.SimpleNamespace(snapshot_download=snapshot_download, hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert local_path("org/name@0123abc") == tmp_path
    module = load_generator("org/name@v1.0:weights/0400000.pt", **HEADS)
    assert files.equal(module.state_dict(), STATE)
    assert asked == [("org/name", "0123abc"), ("org/name", "weights/0400000.pt", "v1.0")]
    with pytest.raises(CheckpointError, match="the hub does not give it: OSError: 404"):
        local_path("org/name@v1.0:absent.pt")
    with pytest.raises(CheckpointError, match="pin its revision: org/name@COMMIT"):
        local_path("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install gear-engine\[hub\]"):
        local_path("org/name@v1.0")


def test_hub_names_offline(tmp_path: Path) -> None:
    """The library itself, over a cache as it lays one out: offline it serves that revision and nothing else."""
    pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--org--name" / "snapshots" / commit
    module = load_generator(save(tmp_path, STATE), **HEADS)
    save_pretrained(place, module)
    (place / "weights").mkdir()
    (tmp_path / "checkpoint.pt").rename(place / "weights" / "7.pt")
    code = """
import sys
from gear_engine.checkpoint import load_generator
from gear_engine.errors import CheckpointError
for name, given in (("", {}), (":weights/7.pt", {"n_head": 4})):
    print(load_generator(f"org/name@{sys.argv[1]}{name}", **given).config.dim)
for name in ("org/name@" + "f" * 40, "org/other@main", f"org/name@{sys.argv[1]}:absent.pt"):
    try:
        load_generator(name)
    except CheckpointError as error:
        print(str(error).startswith(name + ": the hub does not give it"))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-c", code, commit]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["48", "48", "True", "True", "True"], done.stderr


@pytest.mark.skipif("GEAR_OFFICIAL" not in os.environ, reason="needs a checkout of GEAR, named by GEAR_OFFICIAL")
@pytest.mark.parametrize("name", ["VQ-16", "VQ-8", "LFQ-16", "LFQ-8", "GLFQ-16", "IBQ-16"])
def test_official_modules_save_what_we_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gear_engine.config import GENERATOR_PRESETS, TOKENIZER_PRESETS

    monkeypatch.syspath_prepend(os.environ["GEAR_OFFICIAL"])
    from models import Tokenizers, llamagen, llamagen_t2i

    tokenizer = Tokenizers[name]()
    found = load_tokenizer(files.save(tmp_path / "vq.pt", {"vq": tokenizer.state_dict()}))
    assert found.config == TOKENIZER_PRESETS[name]
    assert files.equal(found.state_dict(), tokenizer.state_dict())
    if name != "VQ-16":
        return
    model = llamagen.LlamaGen_models["LlamaGen-B"]()
    model.setup_caches(2, 257, torch.float32)  # Its caches are then in the state dict.
    loaded = load_generator(files.save(tmp_path / "ar.pt", {"ar": model.state_dict()}))
    assert loaded.config == GENERATOR_PRESETS["LlamaGen-B"]
    assert files.equal(loaded.state_dict(), dict(model.named_parameters()))
    text = llamagen_t2i.LlamaGen_models["LlamaGen-S"](cls_token_num=300, caption_dim=2048)
    loaded = load_generator(files.save(tmp_path / "ar.pt", {"ema": text.state_dict()}))
    assert loaded.config == GENERATOR_PRESETS["GEAR-T2I-S"]
    assert files.equal(loaded.state_dict(), text.state_dict())


def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 4 GB sizes and offsets move to an extra field; here every record's do."""
    path = save(tmp_path, STATE)
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in found.items():
            archive.writestr(name, data)
    assert b"PK\x06\x06" in path.read_bytes()
    assert files.equal(read_generator(path, **HEADS).state, STATE)
