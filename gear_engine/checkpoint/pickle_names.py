"""The names that a torch checkpoint's pickle may mention, and the inert data that each of them stands for here.

Source: PyTorch ``torch/_utils.py`` (``_rebuild_tensor_v2``, ``_rebuild_tensor_v3``, ``_rebuild_parameter``) and
``torch/serialization.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from gear_engine.checkpoint.stored import OtherTensor, StorageRef, StoredTensor
from gear_engine.errors import CheckpointError, UnsafeCheckpointError

__all__ = ["CALLS", "NAMES", "NAMESPACE", "Name", "Namespace", "refuse", "set_item", "storage_ref"]


@dataclass(frozen=True, slots=True)
class Name:
    """A name that the pickle mentions: ``module.name``. Inert."""

    path: str


class Namespace(dict[str, Any]):
    """``argparse.Namespace``: its attributes as a dictionary."""


_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_OTHER_TENSORS = {
    f"torch._utils.{name}"
    for name in (
        "_rebuild_device_tensor_from_cpu_tensor",
        "_rebuild_device_tensor_from_numpy",
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_nested_tensor",
        "_rebuild_qtensor",
        "_rebuild_sparse_csr_tensor",
        "_rebuild_sparse_tensor",
        "_rebuild_wrapper_subclass",
    )
}
_MAX_DIMS = 16


def _is_ints(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value)


def _build_tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> StoredTensor:
    if not isinstance(storage, StorageRef) or type(offset) is not int or offset < 0:
        raise CheckpointError("damaged pickle: a tensor without a storage or offset")
    if not (_is_ints(shape) and _is_ints(stride) and len(shape) == len(stride) <= _MAX_DIMS):
        raise CheckpointError("damaged pickle: a tensor whose shape or stride is not a tuple of sizes")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise CheckpointError("damaged pickle: a tensor without a dtype")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _rebuild_tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    return _build_tensor(storage, offset, shape, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    if not isinstance(dtype, Name) or dtype.path not in _DTYPES:
        raise CheckpointError("damaged pickle: a tensor without a known dtype")
    return _build_tensor(storage, offset, shape, stride, _DTYPES[dtype.path])


def _rebuild_parameter(data: Any, *_: Any) -> StoredTensor | OtherTensor:
    if not isinstance(data, (StoredTensor, OtherTensor)):
        raise CheckpointError("damaged pickle: a parameter without a tensor")
    return data


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for pair in items if isinstance(items, (list, tuple)) else ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise CheckpointError("damaged pickle: an OrderedDict of something else than pairs")
        set_item(out, *pair)
    return out


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise CheckpointError("damaged pickle: bytes that are no text in Latin-1")
    return text.encode("latin1", errors="replace")


def _sequence(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items) if isinstance(items, (list, tuple)) else ()


def _text(*parts: Any) -> str:
    # Never str() of what a file built: nested references to one list would print exponentially long.
    return ":".join(str(part) for part in parts if isinstance(part, (str, int)))


#: Every name that may be called, and what stands for it. All are functions of this module on plain data.
CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": lambda counts=None: dict(counts) if type(counts) is dict else {},
    "torch.Size": _sequence,
    "torch.device": _text,
    "torch.serialization._get_layout": _text,
    "builtins.set": _sequence,
    "__builtin__.set": _sequence,
    "_codecs.encode": _encode,
    "builtins.complex": lambda *parts: OtherTensor("complex number"),
    "__builtin__.complex": lambda *parts: OtherTensor("complex number"),
    **{path: (lambda *parts, kind=path: OtherTensor(kind)) for path in _OTHER_TENSORS},
    "torch._tensor._rebuild_from_type_v2": lambda *parts: OtherTensor("tensor subclass"),
}
NAMESPACE = "argparse.Namespace"
NAMES = {
    *CALLS,
    NAMESPACE,
    *_DTYPES,
    *(f"torch.{name}" for name in _STORAGE_DTYPES),
    "torch.storage.UntypedStorage",
    "torch.storage.TypedStorage",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.per_tensor_affine",
    "torch.per_channel_affine",
}


def set_item(out: Any, key: Any, value: Any) -> None:
    # Scalar keys only: hashing a deeply nested tuple would overflow the C stack.
    if not isinstance(out, dict):
        raise CheckpointError("damaged pickle: an entry is set in something that is no dictionary")
    if key is not None and not isinstance(key, (str, int, float, bytes)):
        raise CheckpointError(f"a dictionary key of type {type(key).__name__}; checkpoints use strings and numbers")
    if key in out and isinstance(key, str):
        raise CheckpointError(f"damaged pickle: two entries are called {key!r}")
    out[key] = value


def refuse(path: str) -> NoReturn:
    raise UnsafeCheckpointError(
        f"the file's pickle names {path[:200]!r}, which is not among the few names that tensors need; it was not "
        "imported and nothing was run. If you trust the file, load it in torch yourself, and save its state dict alone"
    )


def storage_ref(reference: Any) -> StorageRef:
    """The storage that a persistent id ``("storage", type, key, device, elements)`` names."""
    if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
        raise CheckpointError("damaged pickle: a reference to something that is no storage")
    _, kind, key, _, numel = reference
    if not isinstance(kind, Name) or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise CheckpointError("damaged pickle: a storage without a type, key or size")
    dtype = _STORAGE_DTYPES.get(kind.path.removeprefix("torch."))
    if dtype is None and kind.path != "torch.storage.UntypedStorage":
        raise CheckpointError(f"a storage of type {kind.path}")
    return StorageRef(key, dtype, numel)
