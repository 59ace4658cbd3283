"""Builds the compiled module by driving CMake; CMake owns the source list and every compiler flag.

Environment:
    GEAR_CUDA: ``AUTO`` (default: by whether a CUDA compiler is found), ``ON`` or ``OFF``.
    GEAR_CUDA_ARCHS: CUDA architectures in CMake's notation, or ``release`` for all that a wheel ships.
    GEAR_WERROR: ``ON`` makes compiler warnings errors (developers and CI).
    GEAR_SANITIZE: ``address`` or ``thread`` for a sanitizer build.
    GEAR_GPU_SMOKE: ``ON`` also builds the CUDA op tests that need no torch.
    GEAR_BUILD_DIR: CMake's build folder ; a working copy's default is ``build/cmake-<tag>``.
    MAX_JOBS: number of compile jobs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
#: Environment variables that are CMake cache entries of the same name.
CMAKE_SETTINGS = ("GEAR_CUDA", "GEAR_CUDA_ARCHS", "GEAR_WERROR", "GEAR_SANITIZE", "GEAR_GPU_SMOKE")
#: Packages that live at the top of the repository and are installed inside gear_engine.
MAPPED_PACKAGES = {"gear_engine.bench": "bench", "gear_engine.triton_kernels": "triton_kernels"}


def _program(name: str) -> str:
    """Path of a build program: the one installed beside this Python (by its wheel), else the first on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"{name} was not found; `pip install {name}` provides it")
    return found


class CMakeBuild(build_ext):
    """``build_ext`` that hands the whole job to CMake."""

    def run(self) -> None:
        # setuptools builds in its own folder and copies, and clears the flag meanwhile.
        self.for_working_copy = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        tag = sysconfig.get_config_var("EXT_SUFFIX").strip(".").removesuffix(".so")
        # A working copy keeps its build folder for incremental builds; a wheel's may not meet another environment's.
        default = ROOT / "build" / f"cmake-{tag}" if self.for_working_copy else self.build_temp
        build_dir = Path(os.environ.get("GEAR_BUILD_DIR", default)).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        settings = {name: os.environ[name] for name in CMAKE_SETTINGS if name in os.environ}
        settings |= {
            "CMAKE_BUILD_TYPE": "RelWithDebInfo" if settings.get("GEAR_SANITIZE") else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent),
            "CMAKE_MAKE_PROGRAM": _program("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "GEAR_VERSION": self.distribution.get_version(),
        }
        cmake = _program("cmake")
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *definitions], check=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([cmake, "--build", str(build_dir), *jobs], check=True)


setup(
    packages=[*find_packages(include=["gear_engine", "gear_engine.*"]), *MAPPED_PACKAGES],
    package_dir=MAPPED_PACKAGES,
    package_data={
        "gear_engine": ["py.typed", "*.pyi"],
        "gear_engine.report": ["*.json", "*.html", "*.j2"],
        "gear_engine.pretrained": ["shapes/*"],
        "gear_engine.training": ["configs/*.toml"],
    },
    ext_modules=[Extension("gear_engine._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
