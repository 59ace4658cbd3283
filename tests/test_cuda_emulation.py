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


RACE = "ThreadSanitizer: data race"


@dataclass(frozen=True)
class Planted:
    """A barrier that is left out: the next ``barrier`` after ``code`` in ``file``, which ``case`` must miss."""

    case: str
    file: str
    code: str
    barrier: str = "__syncthreads();"
    finds: str = RACE


PLANTED = [
    Planted("codebook_quantize", "codebook_quantize_exact.cuh", "best_of_block(Candidate mine"),
    Planted("codebook_quantize_three_terms", "codebook_quantize_tensor.cuh", "Phase 1: this warp's rows"),
    Planted("codebook_quantize_three_terms", "codebook_quantize_tensor.cuh", "Phase 2: all codes"),
    Planted("decode_attention", "decode_attention.cu", "shared.parts[warp][element] ="),
    Planted("sample_tokens", "sample_tokens.cu", "double* buffer = shared_.sums"),
    Planted("sign_bits", "sign_bits.cu", "shared[threadIdx.x] = bits"),
    Planted("skinny_linear_narrow", "skinny_linear_narrow.cuh", "Phase 4"),
    Planted("skinny_linear_narrow", "skinny_linear_narrow.cuh", "wait_for_oldest(stages);", "__syncwarp();"),
    Planted("skinny_linear_narrow", "skinny_linear_narrow.cuh", "} else {", "copy_async_wait", finds="failed: finite"),
    Planted("skinny_linear_wide", "skinny_linear_wide.cuh", "Phase 2"),
    Planted("skinny_linear_wide", "skinny_linear_wide.cuh", "result[token * kColumns + column] ="),
    Planted("skinny_linear_f32_few", "skinny_linear_f32.cuh", "copy_async_wait<1>();"),
    Planted("skinny_linear_f32_few", "skinny_linear_f32.cuh", "add_lanes(sums", "__syncwarp();"),
    *(
        Planted(case, file, code, "dependency_wait();", finds="ended without dependency_wait()")
        for case, file, code in (
            ("decode_attention", "decode_attention.cu", "dependency_launch();"),
            ("sample_tokens", "sample_tokens.cu", "dependency_launch();"),
            ("skinny_linear_overlap", "skinny_linear.cuh", "dependency_launch();"),
            ("skinny_linear_overlap", "skinny_linear_narrow.cuh", "dependency_launch();"),
            ("skinny_linear_overlap", "skinny_linear_wide.cuh", "dependency_launch();"),
            ("skinny_linear_overlap", "skinny_linear_f32.cuh", "dependency_launch();"),
        )
    ),
]


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


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: f"{planted.file}-{planted.code}"[:60])
def test_a_missing_barrier_is_found(planted: Planted) -> None:
    lines = (emulation.ROOT / "csrc" / "cuda" / planted.file).read_text().splitlines()
    start = next(number for number, line in enumerate(lines, 1) if planted.code in line)
    barrier = next(number for number, line in enumerate(lines, 1) if number > start and planted.barrier in line)
    done = run("thread", planted.case, GEAR_OMIT_BARRIER=f"{planted.file}:{barrier}")
    assert done.returncode != 0
    assert planted.finds in done.stderr
    # A copy that nobody waits for long enough is made, and found, where it is waited for.
    assert planted.finds != RACE or planted.file in done.stderr or "copy_async_wait" in done.stderr


def test_every_kernel_has_a_planted_defect() -> None:
    assert set(emulation.OPS) <= {re.split("[.]|_(narrow|wide|f32|exact|tensor)", one.file)[0] for one in PLANTED}
    waits = [
        path.name for path in (emulation.ROOT / "csrc/cuda").glob("*.cu*") if "  dependency_wait();" in path.read_text()
    ]
    assert sorted(waits) == sorted(one.file for one in PLANTED if "dependency_wait" in one.barrier)


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
