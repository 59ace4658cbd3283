"""The CUDA kernels built for the CPU (``tests/csrc/cuda_emulation.h``): a module, and drivers for the sanitizers."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulated"
#: Kernels of which CUDA sources exist.
OPS = tuple(sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")))


def _program(name: str) -> str:
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found is not None, f"{name} is not installed"
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"


def _configure() -> None:
    settings = {
        "GEAR_CUDA": "OFF",
        "GEAR_EMULATE_CUDA": "ON",
        "CMAKE_BUILD_TYPE": "",
        "CMAKE_MAKE_PROGRAM": _program("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    definitions = (f"-D{name}={value}" for name, value in settings.items())
    _run(_program("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *definitions)


@functools.cache
def build() -> None:
    """Compiles all of the emulation, together, so that no core idles; what is up to date stays.

    Other test processes that want it meanwhile wait, and find it built.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _configure()
        targets = ("emulated", "emulated_address", "emulated_thread")
        _run(_program("cmake"), "--build", str(BUILD), "--target", *targets)


def program(sanitizer: str) -> Path:
    """The driver of all kernels under ``address`` (with undefined behaviour) or ``thread``."""
    build()
    return BUILD / f"emulated_{sanitizer}"


@functools.cache
def module() -> types.ModuleType:
    """A module with the ``*_cuda`` functions of ``gear_engine._C``, whose kernels run on the CPU."""
    build()
    (path,) = BUILD.glob("emulated.*.so")
    spec = importlib.util.spec_from_file_location("emulated", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@contextmanager
def cuda_kernels(device: torch.device) -> Iterator[tuple[types.ModuleType, int]]:
    """Takes the place of :func:`gear_engine.ops.native.cuda_kernels`."""
    assert device.type == "cpu"
    yield module(), 0
