"""A stage-1 file is several times larger than the models in it that inference needs; only those are loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gear_engine.config import GeneratorConfig
from tests.checkpoint import files

CONFIG = GeneratorConfig(dim=256, n_layer=6, n_head=4, vocab_size=16384, num_classes=1000, block_size=16)
ALLOWED = 1.3

CHILD = """
import json, sys
from pathlib import Path
import torch
from gear_engine.checkpoint import load_pair

def memory(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field + ":"))

torch.set_num_threads(1)
small, large, dtype = sys.argv[1:]
load_pair(small, n_head=4)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
pair = load_pair(large, n_head=4, dtype=getattr(torch, dtype))
models = (pair.generator, pair.tokenizer)
kept = sum(t.numel() * t.element_size() for m in models for t in m.state_dict().values())
print(json.dumps({"kept": kept, "growth": memory("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("memory")
    small = files.save(folder / "small.pt", files.stage1())
    state = {name: torch.full(shape, 0.5) for name, shape in files.generator_shapes(CONFIG).items()}
    live = {name: tensor.clone() for name, tensor in state.items()}
    args = {**files.ARGS, "codebook_size": 16384, "num_classes": 1000}
    codes = files.VQ.replace(codebook_size=16384)
    root = files.stage1(
        ar=live,
        ema=state,
        opt_ar=files.optimizer(state),
        vq=files.tokenizer_state(codes, 1.0),
        vq_ema=files.tokenizer_state(codes),
        args=args,
    )
    return small, files.save(folder / "large.pt", root)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_a_stage_1_file(checkpoints: tuple[Path, Path], dtype: str) -> None:
    small, large = checkpoints
    command = [sys.executable, "-c", CHILD, str(small), str(large), dtype]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    kept_in_fp32 = result["kept"] * (2 if dtype == "bfloat16" else 1)
    assert large.stat().st_size > 3.5 * kept_in_fp32, "the file should be several times larger than what is kept"
    # Converting holds one tensor in both dtypes: the largest is the token table.
    table = CONFIG.vocab_size * CONFIG.dim * 4 if dtype == "bfloat16" else 0
    print(
        f"kept {result['kept'] >> 20} MB, peak growth {result['growth'] >> 20} MB, file {large.stat().st_size >> 20} MB"
    )
    assert result["growth"] <= ALLOWED * result["kept"] + table
