"""Every code path of the CPU kernels, forced in turn: instruction sets and, within AVX-512, its extensions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gear_engine.ops import native

LEVELS = ("portable", "avx2", "avx512")
_EXTENSIONS = ("vnni", "bf16", "amx")
#: name -> (level, extensions that may be used)
PATHS: dict[str, tuple[str, tuple[str, ...]]] = {
    "portable": ("portable", ()),
    "avx2": ("avx2", ()),
    "avx512": ("avx512", ()),
    "avx512-dot": ("avx512", ("vnni", "bf16")),
    "avx512-amx": ("avx512", _EXTENSIONS),
}


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Runs the body on one path; skips the test if the machine lacks its instruction set.

    An extension that the machine lacks is simply not used: the path then repeats the one before it.
    """
    kernels = native.module()
    level, allowed = PATHS[path]
    if LEVELS.index(level) > LEVELS.index(kernels.best_cpu_isa()):
        pytest.skip(f"this machine has no {level}")
    before = kernels.cpu_isa()
    kernels.set_cpu_isa(level)
    for extension in _EXTENSIONS:
        kernels.allow_cpu_extension(extension, extension in allowed)
    try:
        yield
    finally:
        kernels.set_cpu_isa(before)
        for extension in _EXTENSIONS:
            kernels.allow_cpu_extension(extension, True)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
