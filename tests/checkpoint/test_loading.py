"""How weights get from the file into a module: views of storages, and what loading must not drag in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from gear_engine.checkpoint import open_generator, read_generator
from gear_engine.errors import UnsafeCheckpointError
from tests.checkpoint import files
from tests.checkpoint.files import HEADS
from tests.checkpoint.test_refusals import STATE, refused, save


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
