"""Every CUDA kernel runs on the CPU under the sanitizers, and a barrier that is missing would be found."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

import pytest
import torch

from tests import emulation
from tests.ops.conftest import OnDevice


@dataclass(frozen=True)
class SettingsForTests:
    scale: torch.Tensor
    count: int


#: Per case, a file and the code in it whose next __syncthreads is left out.
PLANTED = {
    "codebook_quantize": ("codebook_quantize_exact.cuh", "best_of_block(Candidate mine"),
    "decode_attention": ("decode_attention.cu", "shared.parts[warp][element] ="),
    "sample_tokens": ("sample_tokens.cu", "double* buffer = shared_.sums"),
    "skinny_linear": ("skinny_linear_narrow.cuh", "Phase 4"),
}


def run(sanitizer: str, *cases: str, **environment: str) -> subprocess.CompletedProcess[str]:
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(
        [emulation.program(sanitizer), *cases],
        env=os.environ | options | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels_run_clean(sanitizer: str) -> None:
    done = run(sanitizer)
    assert done.returncode == 0, done.stderr[-6000:]
    assert set(emulation.OPS) <= set(re.findall(r"^ok (\w+)$", done.stdout, re.M)), "a kernel without a case"


@pytest.mark.parametrize("case", sorted(PLANTED))
def test_a_missing_barrier_is_found(case: str) -> None:
    file, code = PLANTED[case]
    lines = (emulation.ROOT / "csrc" / "cuda" / file).read_text().splitlines()
    start = next(number for number, line in enumerate(lines, 1) if code in line)
    barrier = next(number for number, line in enumerate(lines, 1) if number > start and "__syncthreads();" in line)
    done = run("thread", case, GEAR_OMIT_BARRIER=f"{file}:{barrier}")
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
    assert file in done.stderr


def test_operands_move_with_their_storage_and_back() -> None:
    """What the op tests do on a machine with a GPU."""
    cache = torch.zeros(3, 8)[:, 1:6]
    scales = SettingsForTests(torch.ones(3), 2)

    def function(view: torch.Tensor, settings: SettingsForTests) -> torch.Tensor:
        assert view.stride() == (8, 1)
        assert view.storage_offset() == 1
        assert view.data_ptr() != cache.data_ptr()
        view[1] = 5
        return settings.scale * settings.count

    assert torch.equal(OnDevice(function, torch.device("cpu"))(cache, settings=scales), torch.full((3,), 2.0))
    assert torch.equal(cache, torch.tensor([[0.0], [5.0], [0.0]]).expand(3, 5))
