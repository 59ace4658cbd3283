"""References to tensors that lie in a checkpoint file: where, of what dtype, in what shape. Nothing is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["OtherTensor", "StorageRef", "StoredTensor", "contiguous_stride"]


@dataclass(frozen=True, slots=True)
class StorageRef:
    """One of the file's storages: record ``data/<key>``; ``dtype`` None for untyped bytes."""

    key: str
    dtype: torch.dtype | None
    numel: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A strided view of a storage; ``offset`` and ``stride`` in elements. Nothing is read yet."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor that is not dense and strided (sparse, quantized, a subclass): never a weight."""

    kind: str


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))
