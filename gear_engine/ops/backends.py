"""The one place where a backend is chosen: per op, device and dtype, loudly.

An op has one numerical contract and several implementations, each registered here under a backend name:

==============  =====================================================================
``reference``   plain torch, any device and dtype; what tests and benchmarks compare with
``cpu``         compiled C++ (``csrc/cpu``)
``cuda``        compiled CUDA (``csrc/cuda``)
``triton``      Triton (``gear_engine.triton_kernels``)
``chunked``     plain torch in blocks of rows, any device: what the reference computes, in bounded memory
==============  =====================================================================

:func:`resolve` is called when an engine is built and before a graph is captured. Asking for a backend that cannot run
is an error that says why; ``"auto"`` takes the first of :data:`PREFERENCE` that is registered for the device and dtype
and available, and :func:`table` shows what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from gear_engine.errors import BackendUnavailableError

__all__ = ["PREFERENCE", "Implementation", "implementations", "register", "resolve", "resolve_all", "table"]

#: Order in which ``"auto"`` looks for an implementation, per device type.
PREFERENCE: Final[Mapping[str, tuple[str, ...]]] = {
    "cpu": ("cpu", "chunked", "reference"),
    "cuda": ("cuda", "triton", "chunked", "reference"),
}
_DEFAULT_PREFERENCE: Final = ("chunked", "reference")


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op.

    Attributes:
        op: name of the op; also the name of its module, test and benchmark.
        backend: name of the backend.
        load: returns the callable; called once it is known to be available.
        devices: device types it runs on; None means any.
        dtypes: dtypes it accepts for its main operand; None means any.
        unavailable: returns why it cannot run here, or None if it can.
    """

    op: str
    backend: str
    load: Callable[[], Callable[..., Any]]
    devices: frozenset[str] | None
    dtypes: frozenset[torch.dtype] | None
    unavailable: Callable[[], str | None]

    def why_not(self, device: torch.device, *dtypes: torch.dtype) -> str | None:
        """The reason why this implementation cannot take ``dtypes`` on ``device``, or None if it can."""
        if self.devices is not None and device.type not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))}, not on {device.type}"
        for dtype in dtypes:
            if self.dtypes is not None and dtype not in self.dtypes:
                names = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
                return f"it takes {names}, not {str(dtype).removeprefix('torch.')}"
        return self.unavailable()


_REGISTRY: dict[str, dict[str, Implementation]] = {}


def _always() -> str | None:
    return None


def register(
    op: str,
    backend: str,
    load: Callable[[], Callable[..., Any]],
    *,
    devices: frozenset[str] | None = None,
    dtypes: frozenset[torch.dtype] | None = None,
    unavailable: Callable[[], str | None] = _always,
) -> None:
    """Registers an implementation; a second one under the same names is a programming error."""
    backends = _REGISTRY.setdefault(op, {})
    if backend in backends:
        raise ValueError(f"op {op!r} already has a {backend!r} backend")
    backends[backend] = Implementation(op, backend, load, devices, dtypes, unavailable)


def implementations(op: str) -> Mapping[str, Implementation]:
    """The implementations of ``op`` by backend name."""
    if op not in _REGISTRY:
        raise BackendUnavailableError(f"there is no op {op!r}; there are {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[op]


def resolve(
    op: str, device: torch.device, dtype: torch.dtype, backend: str = "auto", *, other: torch.dtype | None = None
) -> Implementation:
    """The implementation of ``op`` for ``dtype`` on ``device``, and for operands of the dtype ``other``, if there are.

    Raises:
        BackendUnavailableError: the named backend does not exist or cannot run; the message says why.
    """
    found = implementations(op)
    dtypes = (dtype,) if other is None else (dtype, other)
    if backend == "auto":
        for name in PREFERENCE.get(device.type, _DEFAULT_PREFERENCE):
            if name in found and found[name].why_not(device, *dtypes) is None:
                return found[name]
        raise BackendUnavailableError(f"no backend of op {op!r} runs {dtype} on {device}")
    if backend not in found:
        raise BackendUnavailableError(f"op {op!r} has no backend {backend!r}; it has {', '.join(found)}")
    reason = found[backend].why_not(device, *dtypes)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend!r} of op {op!r} cannot be used: {reason}")
    return found[backend]


def resolve_all(
    device: torch.device, dtype: torch.dtype, backend: str | Mapping[str, str] = "auto"
) -> dict[str, Implementation]:
    """:func:`resolve` for every op. ``backend`` is one name for all ops, or a name per op (others ``"auto"``)."""
    if isinstance(backend, str):
        return {op: resolve(op, device, dtype, backend) for op in _REGISTRY}
    for op in backend:
        implementations(op)
    return {op: resolve(op, device, dtype, backend.get(op, "auto")) for op in _REGISTRY}


def table(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """Rows ``(op, backend, status)``; status is ``"selected"``, ``"available"`` or the reason why not."""
    rows = []
    for op, found in sorted(_REGISTRY.items()):
        chosen = resolve(op, device, dtype).backend
        for name, implementation in found.items():
            reason = implementation.why_not(device, dtype)
            rows.append((op, name, "selected" if name == chosen else reason or "available"))
    return rows
