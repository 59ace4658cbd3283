"""What nvcc made of the kernels: compiled for every required architecture, with few spilled registers."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
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
#: What GEAR_CUDA_ARCHS=release builds, beside PTX of compute_90 and compute_120.
RELEASED = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120"}
#: Bytes of stack per thread that a kernel may use, by a part of its name; the others none. All of it is spilled
#: registers or arrays that could not stay in registers.
STACK_BYTES = {"sample_kernel": 128}
#: Instructions that store or load a spilled register, likewise.
SPILLS = {"sample_kernel": 96}
SM_REGISTERS = 65536


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


def _build_folder() -> Path:
    tag = sysconfig.get_config_var("EXT_SUFFIX").strip(".").removesuffix(".so")
    return emulation.ROOT / "build" / f"cmake-{tag}"


def _dump(option: str) -> str:
    if not native.module().build_info()["cuda"]:
        _missing("gear_engine was built without CUDA: no CUDA compiler was found, or GEAR_CUDA=OFF")
    command = [_cuobjdump(), option, str(native.module().__file__)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


@functools.cache
def _kernels() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled kernel) -> what the compiler made of it, counted in the compiled module."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch = kernel = attribute = ""
    for line in _dump("--dump-resource-usage").splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function ([^:]+):", line):
            kernel = match[1]
        elif "REG:" in line:
            use = {name: int(value) for name, value in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line)}
            found[arch, kernel] = {
                "registers": use["REG"],
                "stack_bytes": use["STACK"],
                "local_bytes": use["LOCAL"],
                "shared_bytes": use["SHARED"],
            } | dict.fromkeys(("max_threads", "spill_stores", "spill_loads", "read_only_loads"), 0)
    for line in _dump("--dump-elf").splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\.nv\.info\.(\w+)$", line):
            kernel = match[1]
        elif match := re.match(r"\s*Attribute:\s*(\w+)", line):
            attribute = match[1]
        elif attribute == "EIATTR_MAX_THREADS" and (match := re.match(r"\s*Value:\s*(.*)", line)):
            found[arch, kernel]["max_threads"] = math.prod(int(size, 16) for size in match[1].split())
    for line in _dump("--dump-sass").splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            kernel = match[1]
        elif match := re.search(r"\s(STL|LDL|LDG)(\.[\w.]*)?\s", line):
            kind = {"STL": "spill_stores", "LDL": "spill_loads", "LDG": "read_only_loads"}[match[1]]
            found[arch, kernel][kind] += match[1] != "LDG" or ".CONSTANT" in line
    return found


def _allowed(bounds: dict[str, int], kernel: str) -> int:
    return max((n for part, n in bounds.items() if part in kernel), default=0)


def _most_static_shared() -> int:
    """``kMostStaticShared`` of platform.cuh: what a launch takes every kernel to have."""
    source = (emulation.ROOT / "csrc" / "cuda" / "platform.cuh").read_text()
    match = re.search(r"kMostStaticShared = (\d+) \* 1024;", source)
    assert match is not None
    return int(match[1]) * 1024


def test_every_kernel_is_compiled_and_spills_little() -> None:
    """And has room for its threads. The numbers are left in ``build/kernels.json``."""
    kernels = _kernels()
    report = [{"kernel": kernel, "arch": arch, **use} for (arch, kernel), use in sorted(kernels.items())]
    (emulation.ROOT / "build" / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    if os.environ.get("CI"):
        assert {arch for arch, _ in kernels} >= REQUIRED
    assert kernels
    wrong = [
        f"{arch} {kernel}: {use}"
        for (arch, kernel), use in kernels.items()
        if use["stack_bytes"] > _allowed(STACK_BYTES, kernel)
        or use["spill_stores"] + use["spill_loads"] > _allowed(SPILLS, kernel)
        or use["local_bytes"] > 0
        or not 0 < use["max_threads"] * use["registers"] <= SM_REGISTERS
    ]
    assert not wrong, "\n".join(wrong)


def test_static_shared_memory_is_what_launches_take_it_to_be() -> None:
    """Static bytes count among the 48 KiB that need no asking; what takes all of a block's memory leaves it 1 KiB."""
    for (arch, kernel), use in _kernels().items():
        # From sm_90 on, what CUDA keeps for itself is reported too.
        static = use["shared_bytes"] - (1024 if int(re.sub(r"\D", "", arch)) >= 90 else 0)
        assert static <= _most_static_shared(), (arch, kernel)
        if "narrow" in kernel:
            assert static <= 1024, (arch, kernel)


def test_two_blocks_of_the_narrow_kernel_have_registers_in_an_sm() -> None:
    for (arch, kernel), use in _kernels().items():
        if "narrow" in kernel:
            assert 2 * use["max_threads"] * use["registers"] <= SM_REGISTERS, (arch, kernel)


def test_nothing_is_read_through_the_read_only_cache() -> None:
    """A kernel that starts before the one before it has ended reads memory that is still being written."""
    assert not [place for place, use in _kernels().items() if use["read_only_loads"]]


def _release_archs() -> list[str]:
    """What CMakeLists.txt makes of GEAR_CUDA_ARCHS=release, in CMake's notation."""
    text = (emulation.ROOT / "CMakeLists.txt").read_text()
    match = re.search(r'GEAR_CUDA_ARCHS STREQUAL "release".*?set\(CMAKE_CUDA_ARCHITECTURES ([^)]*)\)', text, re.S)
    assert match is not None
    return match[1].split()


def test_a_release_has_code_for_every_generation(tmp_path: Path) -> None:
    """The smallest source, for all of them; ``make cuda-release`` compiles every kernel."""
    if not native.module().build_info()["cuda"]:
        _missing("gear_engine was built without CUDA: no CUDA compiler was found, or GEAR_CUDA=OFF")
    settings = (_build_folder() / "CMakeCache.txt").read_text()
    compiler = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", settings, re.M)
    assert compiler is not None
    flags = []
    for name in _release_archs():
        arch, _, kind = name.partition("-")
        codes = [f"sm_{arch}"] * (kind != "virtual") + [f"compute_{arch}"] * (kind != "real")
        flags.append(f"-gencode=arch=compute_{arch},code=[{','.join(codes)}]")
    source, built = emulation.ROOT / "csrc" / "cuda" / "sign_bits.cu", tmp_path / "sign_bits.fatbin"
    options = ("-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings", "-I", str(emulation.ROOT / "csrc"))
    subprocess.run([compiler[1], *options, *flags, "--fatbin", "-o", built, source], timeout=600, check=True)
    listing = subprocess.run(
        [_cuobjdump(), "--list-elf", "--list-ptx", built], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    assert set(re.findall(r"ELF file.*\.(sm_\w+)\.cubin", listing)) == RELEASED
    # For compute capabilities 10.3, 11.0 and 12.1, which have no code of their own.
    assert set(re.findall(r"PTX file.*\.(sm_\w+)\.ptx", listing)) == {"sm_90", "sm_120"}


def test_the_profiled_names_are_kernels() -> None:
    """``make gpu-test`` looks for them in what the profiler prints."""
    mangled = "\n".join({kernel for _, kernel in _kernels()})
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [op for op, pattern in PROFILED.items() if not re.search(pattern, names)] == []


def test_the_driver_for_a_gpu_runs_or_says_that_there_is_none() -> None:
    """What ``make gpu-test`` gives to compute-sanitizer is linked, and starts."""
    program = _build_folder() / "gpu_smoke"
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
