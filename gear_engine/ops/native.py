"""The compiled module, if it was built and fits this interpreter.

``GEAR_NATIVE_MODULE`` names the file of another build to load in its place, such as a sanitizer build.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gear_engine.errors import BackendUnavailableError

__all__ = ["cpu_kernels", "cuda_kernels", "module", "unavailable"]


def _load_file(path: str) -> types.ModuleType:
    name = "gear_engine._C"
    if name in sys.modules:
        raise ImportError(f"{name} was imported before {path} could take its place")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ImportError(f"GEAR_NATIVE_MODULE names {path}, which is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


@functools.cache
def _load() -> tuple[types.ModuleType | None, str | None]:
    override = os.environ.get("GEAR_NATIVE_MODULE")
    try:
        if override:
            return _load_file(override), None
        from gear_engine import _C
    except ImportError as error:
        return None, f"the compiled module gear_engine._C cannot be imported ({error}); run `pip install -e .`"
    return _C, None


def module() -> types.ModuleType:
    """``gear_engine._C``.

    Raises:
        BackendUnavailableError: it was not built, or not for this interpreter; the message says what to do.
    """
    found, reason = _load()
    if found is None:
        raise BackendUnavailableError(str(reason))
    return found


def cpu_kernels() -> types.ModuleType:
    """``gear_engine._C`` for a call of CPU kernels, which share the work among ``torch.get_num_threads()`` threads."""
    found = module()
    found.set_num_threads(torch.get_num_threads())
    return found


@contextmanager
def cuda_kernels(device: torch.device) -> Iterator[tuple[types.ModuleType, int]]:
    """``gear_engine._C`` and the handle of ``device``'s current stream, for calls of CUDA kernels on that device."""
    with torch.cuda.device(device):
        yield module(), torch.cuda.current_stream().cuda_stream


def unavailable(symbol: str) -> str | None:
    """Why the compiled function ``symbol`` cannot be called, or None if it can."""
    found, reason = _load()
    if found is None:
        return reason
    if hasattr(found, symbol):
        return None
    if symbol.endswith("_cuda"):
        return "gear_engine was built without CUDA (install with GEAR_CUDA=ON and nvcc on PATH)"
    return f"the compiled module has no {symbol}; it is older than the Python code, run `pip install -e .`"
