"""The compiled module, if it was built and fits this interpreter."""

from __future__ import annotations

import functools
import types

from gear_engine.errors import BackendUnavailableError

__all__ = ["module", "unavailable"]


@functools.cache
def _load() -> tuple[types.ModuleType | None, str | None]:
    try:
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
