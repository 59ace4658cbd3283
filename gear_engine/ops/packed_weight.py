"""Packed weights of linear layers, in the layout that the CPU kernels read (``csrc/common/packing.h``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from gear_engine.pages import LargePages

__all__ = ["PackKind", "PackedWeight", "Weight", "pack", "packed_nbytes", "unpack"]

PackKind = Literal["bf16", "int8"]


@dataclass(frozen=True)
class PackedWeight:
    """A linear weight in the layout that the compiled kernels read; made by :func:`pack`.

    Attributes:
        kind: ``"bf16"`` or ``"int8"``.
        data: the packed numbers (panels, lines, 16, values per line), as ``csrc/common/packing.h`` lays them out.
        scales: fp32 (out_features,) for ``"int8"``: weight = data * scale; None for ``"bf16"``.
        out_features, in_features: the weight's shape.
    """

    kind: PackKind
    data: torch.Tensor
    scales: torch.Tensor | None
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (self.scales.nbytes if self.scales is not None else 0)


#: What a linear layer multiplies by: a tensor (out_features, in_features) or a packed one.
Weight = torch.Tensor | PackedWeight


#: Rows that are packed at once, a multiple of a panel's 16: packing needs little memory beside its result.
_PACK_ROWS = 256


def pack(weight: torch.Tensor, kind: PackKind, pages: LargePages | None = None) -> PackedWeight:
    """Packs a weight (out, in). ``"int8"`` rounds to nearest with scale = max|row| / 127.

    Args:
        pages: where the result's memory comes from, shared by weights that are read one after the other.

    Raises:
        ValueError: the weight is not a matrix or the kind is unknown.
    """
    if weight.dim() != 2:
        raise ValueError(f"a linear weight is a matrix, not {tuple(weight.shape)}")
    if kind not in ("bf16", "int8"):
        raise ValueError(f"a weight packs as 'bf16' or 'int8', not {kind!r}")
    out_features, in_features = weight.shape
    dtype = torch.bfloat16 if kind == "bf16" else torch.int8
    per_line = 4 // dtype.itemsize  # a line holds 4 bytes for each of 16 columns
    lines = -(-in_features // (16 * per_line)) * 16
    shape = -(-out_features // 16), lines, 16, per_line
    data = (pages or LargePages()).zeros(shape, dtype, weight.device)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    scales = torch.empty(out_features, **wide) if kind == "int8" else None
    scratch = torch.empty(_PACK_ROWS if kind == "int8" else 0, in_features, **wide)
    for first in range(0, out_features, _PACK_ROWS):
        rows = weight.detach()[first : first + _PACK_ROWS]
        if scales is not None:
            scale = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).float() / 127
            scales[first : first + _PACK_ROWS] = scale
            safe = torch.where(scale > 0, scale, 1.0)
            rows = torch.div(rows, safe[:, None], out=scratch[: len(rows)]).round_().clamp_(-127, 127)
        panels = _to_panels(rows.to(dtype))
        data[first // 16 : first // 16 + len(panels)] = panels
    return PackedWeight(kind, data, scales, out_features, in_features)


def packed_nbytes(out_features: int, in_features: int, kind: PackKind) -> int:
    """Bytes of what :func:`pack` returns: whole panels of 16 columns and lines of 16 x 4 bytes, and the scales."""
    width = 1 if kind == "int8" else 2
    columns = -(-out_features // 16) * 16
    inputs = -(-in_features // (64 // width)) * (64 // width)
    return columns * inputs * width + (4 * out_features if kind == "int8" else 0)


def unpack(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix (out, in) that a packed weight stands for."""
    panels, lines, columns, per_line = packed.data.shape
    rows = packed.data.permute(0, 2, 1, 3).reshape(panels * columns, lines * per_line)
    rows = rows[: packed.out_features, : packed.in_features]
    return rows.to(dtype) if packed.scales is None else (rows.float() * packed.scales[:, None]).to(dtype)


def _to_panels(matrix: torch.Tensor) -> torch.Tensor:
    """(out, in) -> (panels, lines, 16, values per line), zero-padded: the layout of ``csrc/common/packing.h``."""
    per_line = 4 // matrix.element_size()
    out_features, in_features = matrix.shape
    padded = F.pad(matrix, (0, -in_features % (16 * per_line), 0, -out_features % 16))
    return padded.view(padded.shape[0] // 16, 16, -1, per_line).permute(0, 2, 1, 3)
