"""Facts about an architecture from several sources, which must agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from gear_engine.checkpoint.stored import StoredTensor
from gear_engine.errors import CheckpointError

__all__ = ["Shapes", "argument", "count_indices", "rows_of", "settle", "shape_text", "size_of"]

Shapes = Mapping[str, StoredTensor]
T = TypeVar("T")


def settle(what: str, *claims: tuple[str, T | None], default: T | None = None) -> T:
    """The value that all claims (source, value) with a value share.

    Raises:
        CheckpointError: two sources differ (both are named), or nobody knows.
    """
    known = [(source, value) for source, value in claims if value is not None]
    for source, value in known[1:]:
        if value != known[0][1]:
            raise CheckpointError(f"{what}: {known[0][0]} says {known[0][1]}, but {source} says {value}")
    if known:
        return known[0][1]
    if default is None:
        raise CheckpointError(f"{what} is unknown")
    return default


def argument(args: Mapping[str, Any], kind: type[T], *names: str) -> tuple[str, T | None]:
    """The claim of the checkpoint's saved arguments under the first of ``names`` that is there."""
    for name in names:
        value = args.get(name)
        if value is None:
            continue
        if type(value) is not kind or (kind is str and len(str(value)) > 4096):
            raise CheckpointError(f"args.{name} is a {type(value).__name__}, not a sensible {kind.__name__}")
        return f"args.{name}", value
    return f"args.{names[0]}", None


def shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def size_of(shapes: Shapes, name: str, axis: int = 0) -> int:
    """Length of one axis of a tensor that must be there."""
    if name not in shapes:
        raise CheckpointError(f"tensor {name!r} is missing")
    shape = shapes[name].shape
    if len(shape) <= axis or not 1 <= shape[axis] < 2**40:
        raise CheckpointError(f"tensor {name!r} has shape {shape_text(shape)[:100]}")
    return shape[axis]


def rows_of(shapes: Shapes, name: str, columns: int) -> int:
    """N of a tensor that must be N x ``columns``."""
    rows, found = size_of(shapes, name), shapes[name].shape
    if len(found) == 2 and found[1] == columns:
        return rows
    transposed = len(found) == 2 and found[0] == columns
    raise CheckpointError(
        f"tensor {name!r} has shape {shape_text(found)[:100]}; expected "
        + (f"{found[1]} x {columns}: it is transposed" if transposed else f"N x {columns}")
    )


def count_indices(shapes: Shapes, prefix: str, suffix: str = "") -> int:
    """How many i there are with keys ``<prefix><i>.…<suffix>``; they must be 0 … n - 1."""
    found = set()
    for key in shapes:
        if key.startswith(prefix) and key.endswith(suffix):
            index = key[len(prefix) :].partition(".")[0]
            if index.isascii() and index.isdigit() and len(index) < 6:
                found.add(int(index))
    if not found:
        raise CheckpointError(f"no tensor is called {prefix}0…{suffix}")
    absent = set(range(len(found))) - found
    if absent:
        raise CheckpointError(f"{prefix}{min(absent)} is missing (there are {prefix}{max(found)} and others)")
    return len(found)
