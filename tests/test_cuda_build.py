"""What nvcc made of the kernels: compiled for every required architecture, with few spilled registers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from gear_engine.bench.gpu_stages import PROFILED
from gear_engine.ops import native
from tests import emulation

#: Architectures that CI must build, with warnings as errors (the Makefile's GEAR_CUDA_ARCHS).
REQUIRED = {"sm_80", "sm_90a"}
#: Bytes of stack per thread that a kernel may use, by a part of its name; the others none. All of it is spilled
#: registers or arrays that could not stay in registers.
STACK_BYTES = {"sample_kernel": 128}


def _missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{what}; CI must have it")
    pytest.skip(what)


def _cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None or not os.access(found, os.X_OK):
        _missing("cuobjdump was not found (the CUDA toolkit and triton's wheel have it)")
    return str(found)


def _resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled kernel) -> registers, stack bytes, shared bytes …"""
    if not native.module().build_info()["cuda"]:
        _missing("gear_engine was built without CUDA: no CUDA compiler was found, or GEAR_CUDA=OFF")
    report = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", str(native.module().__file__)],
        capture_output=True, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip
    found, arch, kernel = {}, "", ""
    for line in report.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function ([^:]+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[arch, kernel] = {name: int(value) for name, value in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line)}
    return found


def test_every_kernel_is_compiled_and_spills_little() -> None:
    resources = _resources()
    archs = {arch for arch, _ in resources}
    if os.environ.get("CI"):
        assert archs >= REQUIRED
    for arch in archs:
        kernels = " ".join(kernel for found_arch, kernel in resources if found_arch == arch)
        assert kernels
    too_much = {
        place: use
        for place, use in resources.items()
        if use["STACK"] > max((n for part, n in STACK_BYTES.items() if part in place[1]), default=0) or use["LOCAL"] > 0
    }
    assert not too_much, "\n".join(f"{arch} {kernel}: {use}" for (arch, kernel), use in too_much.items())


def test_the_profiled_names_are_kernels() -> None:
    """``make gpu-test`` looks for them in what the profiler prints."""
    mangled = "\n".join({kernel for _, kernel in _resources()})
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [op for op, pattern in PROFILED.items() if not re.search(pattern, names)] == []


def test_the_driver_for_a_gpu_runs_or_says_that_there_is_none() -> None:
    """What ``make gpu-test`` gives to compute-sanitizer is linked, and starts."""
    tag = sysconfig.get_config_var("EXT_SUFFIX").strip(".").removesuffix(".so")
    program = emulation.ROOT / "build" / f"cmake-{tag}" / "gpu_smoke"
    if not native.module().build_info()["cuda"] or not program.is_file():
        _missing("gpu_smoke was not built: no CUDA compiler was found, or GEAR_GPU_SMOKE is not ON")
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    if torch.cuda.is_available():
        assert done.returncode == 0, done.stderr
        assert {f"ok {op}" for op in emulation.OPS} <= set(done.stdout.splitlines())
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("no CUDA device: ")


@pytest.mark.parametrize("op", emulation.OPS)
def test_no_kernel_includes_cuda_headers_itself(op: str) -> None:
    source = (emulation.ROOT / "csrc" / "cuda" / f"{op}.cu").read_text()
    assert '#include "cuda/platform.cuh"' in source
    assert not re.search(r"#include <(cuda|mma|cooperative)", source)
