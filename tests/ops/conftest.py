"""Fixtures of the op tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gear_engine.ops import backends, native
from tests import emulation
from tests.ops import cpu_paths


class OnDevice:
    """Calls ``function`` with copies of its tensors on ``device``, and copies what it wrote back."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device = function, device

    def __call__(self, *operands: Any, **options: Any) -> Any:
        self.moved: list[tuple[torch.Tensor, torch.Tensor]] = []
        found = self.function(
            *(self._there(operand) for operand in operands),
            **{name: self._there(option) for name, option in options.items()},
        )
        for here, there in self.moved:
            if not torch.equal(here, there.cpu()):
                here.copy_(there)
        return tuple(part.cpu() for part in found) if isinstance(found, tuple) else found.cpu()

    def _there(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            # With all its storage: a padded view keeps its strides.
            whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            there = whole.to(self.device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())
            self.moved.append((x, there))
            return there
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            parts = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
            tensors = {name: self._there(part) for name, part in parts.items() if isinstance(part, torch.Tensor)}
            return dataclasses.replace(x, **tensors)
        return x


@pytest.fixture(params=cpu_paths.LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, as far as the machine has it."""
    with cpu_paths.forced(request.param):
        yield request.param


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., Any]]:
    """``emulated(op)``: the op's ``cuda`` backend, called with CPU tensors.

    Its kernels run on a GPU if there is one and they were built for it, otherwise under the emulation.
    """
    if torch.cuda.is_available() and native.unavailable("codebook_quantize_cuda") is None:
        return lambda op: OnDevice(backends.implementations(op)["cuda"].load(), torch.device("cuda"))
    monkeypatch.setattr(native, "cuda_kernels", emulation.cuda_kernels)
    return lambda op: backends.implementations(op)["cuda"].load()
