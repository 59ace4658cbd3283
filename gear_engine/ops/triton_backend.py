"""Registers an op's Triton implementation: ``gear_engine.triton_kernels.<op>.<op>``.

Triton kernels run on GPUs. With ``TRITON_INTERPRET=1`` set before Python starts they also run on the CPU, slowly, under
Triton's interpreter: that is how their logic is tested on a machine without a GPU. ``"auto"`` never picks that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Final

import torch

from gear_engine.ops import backends

__all__ = ["FLOATS", "kernel", "register"]

FLOATS: Final = frozenset({torch.float32, torch.float16, torch.bfloat16})
_INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"


def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'gear-engine[triton]')"
    return None


def kernel(op: str) -> Callable[..., Any]:
    """``gear_engine.triton_kernels.<op>.<op>``; imported when it is first asked for."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"gear_engine.triton_kernels.{op}"), op)
    return function


def register(
    op: str, dtypes: frozenset[torch.dtype] = FLOATS, *, load: Callable[[], Callable[..., Any]] | None = None
) -> None:
    """Registers backend ``"triton"`` for ``op``: its kernel's launcher, or what ``load`` returns."""
    devices = frozenset({"cuda", "cpu"}) if _INTERPRETED else frozenset({"cuda"})
    backends.register(
        op, "triton", load or (lambda: kernel(op)), devices=devices, dtypes=dtypes, unavailable=_unavailable
    )
