"""Strict loading: every tensor that the model has, no other, in its shape, and finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gear_engine.checkpoint.claims import Shapes, shape_text
from gear_engine.errors import CheckpointError

__all__ = ["assign", "check_names_and_shapes", "expected_shapes", "finisher", "on_meta"]

AnyModule = TypeVar("AnyModule", bound=nn.Module)

_LISTED = 5


class _WithoutInitialisation(TorchFunctionMode):
    """Within the block nobody fills a tensor: on the meta device that means nothing, and imports torch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FILLS or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


_FILLS = {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_}


def on_meta(build: Callable[[], AnyModule]) -> AnyModule:
    """What ``build`` makes, on the meta device: shapes without memory."""
    with torch.device("meta"), _WithoutInitialisation():
        return build()


def expected_shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the module that ``build`` makes; nothing is allocated."""
    return {name: tuple(tensor.shape) for name, tensor in on_meta(build).state_dict().items()}


def check_names_and_shapes(expected: Mapping[str, tuple[int, ...]], shapes: Shapes) -> None:
    """Raises :class:`CheckpointError` that names the missing, unknown or misshapen tensors."""
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    problems = []
    if missing:
        problems.append(f"missing {_list(missing)}")
    if extra:
        problems.append(f"unknown {_list(extra)}")
    wrong = []
    for name, shape in expected.items():
        if name in shapes and shapes[name].shape != shape:
            found = shapes[name].shape
            hint = " (it is transposed)" if len(found) > 1 and found in (shape[::-1], _swapped(shape)) else ""
            wrong.append(f"{name!r} has shape {shape_text(found)[:100]}, expected {shape_text(shape)}{hint}")
    problems += wrong[:_LISTED]
    if problems:
        raise CheckpointError("the tensors are not those of the model: " + "; ".join(problems))


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1], shape[0], *shape[2:]) if len(shape) > 1 else shape


def _list(names: list[str]) -> str:
    shown = ", ".join(repr(name[:120]) for name in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def finisher(
    shapes: Shapes, device: torch.device | str | None, dtype: torch.dtype | None
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """What happens to each tensor when it has been read: refused if not finite, then converted and moved.

    Without ``dtype`` the file's is kept; where a file mixes dtypes, the widest of them is taken for all.
    """
    if dtype is None:
        for tensor in shapes.values():
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)

    def finish(name: str, tensor: torch.Tensor) -> torch.Tensor:
        low, high = torch.aminmax(tensor)
        # Both carry a NaN on; neither needs memory as isfinite() on the tensor would.
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = tensor.numel() - int(sum(part.isfinite().sum() for part in tensor.flatten().split(1 << 20)))
            raise CheckpointError(f"tensor {name!r} holds {count} numbers that are not finite")
        converted = tensor.to(device=device, dtype=dtype)
        if dtype is not None and dtype != tensor.dtype and dtype.itemsize < tensor.dtype.itemsize:
            low, high = torch.aminmax(converted)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise CheckpointError(f"tensor {name!r} has numbers too large for {dtype}; choose a wider dtype")
        return converted

    return finish


def assign(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Puts tensors into a module made on the meta device, without copies; the module is then ready for inference."""
    module.load_state_dict(dict(state), strict=True, assign=True)
    module.eval().requires_grad_(False)
