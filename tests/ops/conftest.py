"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gear_engine.ops import backends, native
from tests import emulation


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., Any]]:
    """``emulated(op)``: the op's ``cuda`` backend, called with CPU tensors; its kernels run under the emulation."""
    monkeypatch.setattr(native, "cuda_kernels", emulation.cuda_kernels)
    return lambda op: backends.implementations(op)["cuda"].load()
