"""Which spans of a storage must be read for the tensors that view it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gear_engine.checkpoint.claims import shape_text
from gear_engine.checkpoint.stored import StoredTensor, contiguous_stride
from gear_engine.errors import CheckpointError, UnsafeCheckpointError

__all__ = ["View", "plan_views", "shaped"]


@dataclass(frozen=True, slots=True)
class View:
    """A flat span of a storage, [start, end) in elements, and the tensors that it holds."""

    start: int
    end: int
    tensor: StoredTensor
    names: list[str]


def plan_views(tensors: Mapping[str, StoredTensor]) -> list[View]:
    """The spans of one storage that its tensors need, in order; tensors that are the same view share one."""
    spans: dict[tuple[Any, ...], View] = {}
    dtype = next(iter(tensors.values())).dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise UnsafeCheckpointError(f"tensor {name!r} shares its storage with one of another dtype")
        if 0 in tensor.shape:
            raise CheckpointError(f"tensor {name!r} is empty: its shape is {shape_text(tensor.shape)}")
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))
        if math.prod(tensor.shape) > span:
            raise UnsafeCheckpointError(
                f"tensor {name!r} of shape {shape_text(tensor.shape)} repeats the {span} numbers that are stored for it"
            )
        key = (tensor.offset, tensor.shape, tensor.stride)
        if key in spans:
            spans[key].names.append(name)
        else:
            spans[key] = View(tensor.offset, tensor.offset + span, tensor, [name])
    views = sorted(spans.values(), key=lambda view: view.start)
    for before, view in itertools.pairwise(views):
        if view.start < before.end:
            raise UnsafeCheckpointError(
                f"tensors {before.names[0]!r} and {view.names[0]!r} overlap in their storage; save clones of them"
            )
    return views


def shaped(flat: torch.Tensor, tensor: StoredTensor) -> torch.Tensor:
    dense = contiguous_stride(tensor.shape)
    # Along an axis of one the stride means nothing, and may be any number.
    sizes_strides = zip(tensor.shape, tensor.stride, dense, strict=True)
    stride = tuple(usual if size == 1 else given for size, given, usual in sizes_strides)
    if stride == dense:
        return flat.view(tensor.shape)
    return flat.as_strided(tensor.shape, stride).contiguous()
