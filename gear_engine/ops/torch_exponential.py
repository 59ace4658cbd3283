"""The noise of ``torch.multinomial`` on a CPU: the next numbers of ``exponential_(1)`` from torch's generator.

Number i takes the next two words w of 32 bits of the generator's Mersenne Twister::

    x[i] = ((w[2 i] 2^32 + w[2 i + 1]) mod 2^53) / 2^53
    out[i] = fp32(-log1p(-x[i]))                                 the logarithm in double

torch makes them one after the other. On two cores of an AMD EPYC (Zen 3) it takes 0.36 ms for an image's step at 16384
codes, the compiled kernel 0.04 (``gear-engine bench torch_exponential``).

Source: Matsumoto and Nishimura, "Mersenne Twister", 1998; torch's documentation of ``Tensor.exponential_`` and
``Generator.get_state``.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from gear_engine.ops import backends, native

__all__ = ["reference", "torch_exponential"]

#: Bytes of the state of torch's CPU generator, in the layout that the kernel knows.
STATE_BYTES: Final = 5056


def torch_exponential(out: torch.Tensor, generator: torch.Generator | None = None, *, backend: str = "auto") -> None:
    """Fills ``out`` with the numbers of ``out.exponential_(1, generator=generator)``; moves the generator as far.

    Args:
        out: fp32, contiguous, any shape.
        generator: one of ``out``'s device; None means torch's default one. What torch itself draws from it in another
            thread meanwhile is undone.
        backend: as in :func:`gear_engine.ops.backends.resolve`.

    Raises:
        ValueError: ``out`` is not fp32 or not contiguous, or the generator belongs to another device.
    """
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError("out must be fp32 and contiguous")
    if generator is not None and generator.device.type != out.device.type:
        raise ValueError(f"the generator draws on {generator.device}, out lies on {out.device}")
    backends.resolve("torch_exponential", out.device, out.dtype, backend).load()(out, generator)


def reference(out: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """torch's own."""
    out.exponential_(1, generator=generator)


#: One per generator that was drawn from: two engines that share one may run in two threads.
_LOCKS: weakref.WeakKeyDictionary[torch.Generator, threading.Lock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK: Final = threading.Lock()


@contextmanager
def moving(generator: torch.Generator | None) -> Iterator[torch.Tensor]:
    """The state of a CPU generator (None: torch's default one) for a kernel to move on. Afterwards, after an error too,
    the generator has it.

    Raises ValueError if the generator belongs to another device.
    """
    source = torch.default_generator if generator is None else generator
    if source.device.type != "cpu":
        raise ValueError(f"numbers on a CPU cannot come from a generator of {source.device}")
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(source, threading.Lock())
    with lock:
        state = source.get_state()
        try:
            yield state
        finally:
            source.set_state(state)


def _cpu(out: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Compiled: words a piece ahead of the logarithms, which threads share. The bits do not depend on their number."""
    with moving(generator) as state:
        native.cpu_kernels().torch_exponential_cpu(state.data_ptr(), out.numel(), out.data_ptr())


@functools.cache
def _why_not() -> str | None:
    """Whether this torch still draws what the kernel draws: its way from words to numbers is nowhere promised."""
    missing = native.unavailable("torch_exponential_cpu")
    if missing is not None:
        return missing
    generators = [torch.Generator("cpu").manual_seed(20260611) for _ in range(2)]
    if generators[0].get_state().numel() == STATE_BYTES:
        expected, found = (torch.empty(1500, dtype=torch.float32, device="cpu") for _ in range(2))
        reference(expected, generators[0])
        _cpu(found, generators[1])
        if torch.equal(expected, found) and torch.equal(generators[0].get_state(), generators[1].get_state()):
            return None
    return f"torch {torch.__version__} draws exponential numbers in another way than the kernel knows"


backends.register("torch_exponential", "reference", lambda: reference)
backends.register(
    "torch_exponential",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
    unavailable=_why_not,
)
