"""A linear layer for few rows, with what surrounds it in a decoder block fused around it.

    x1  = rmsnorm(x) * norm_weight     if norm_weight is given; the norm in fp32, rounded to x's dtype, then weighted
    y   = x1 @ weight^T
    y   = silu(y) * (x1 @ gate^T)      if gate is given (SwiGLU: weight = w1, gate = w3)
    out = residual + y                 if residual is given

    rmsnorm(x) = x / sqrt(mean(x^2) + norm_eps)

Source: GEAR ``models/llamagen.py`` (RMSNorm, FeedForward, TransformerBlock).

A weight may be packed: half the bytes (``"bf16"``) or a quarter (``"int8"``, one fp32 scale per output row). Then x1 is
rounded too before the product, as the kernels multiply equal kinds: to bf16, or to int8 with a scale max|x1| / 127 per
row. Products are summed in fp32 (exactly, in int32, for int8); the reference rounds neither x1 nor the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from gear_engine.ops import backends, native, triton_backend

__all__ = [
    "PackKind",
    "PackedWeight",
    "Weight",
    "pack",
    "packed_nbytes",
    "reference",
    "rms_norm",
    "skinny_linear",
    "unpack",
    "weight_operands",
]

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


def pack(weight: torch.Tensor, kind: PackKind) -> PackedWeight:
    """Packs a weight (out, in). ``"int8"`` rounds to nearest with scale = max|row| / 127.

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
    data = torch.empty(-(-out_features // 16), lines, 16, per_line, dtype=dtype, device=weight.device)
    scales = torch.empty(out_features, device=weight.device) if kind == "int8" else None
    scratch = torch.empty(_PACK_ROWS if kind == "int8" else 0, in_features, device=weight.device)
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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps)`` in fp32 (float64 for float64), rounded to x's dtype, times ``weight``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + eps)).type_as(x) * weight


def skinny_linear(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    gate: Weight | None = None,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The module's formula, checked, by the chosen backend.

    Args:
        x: (R, in), fp32, bf16 or fp16.
        weight: (out, in) of x's dtype, or packed.
        norm_weight: (in,) of x's dtype.
        gate: as ``weight``.
        residual: (R, out) of x's dtype.

    Returns:
        (R, out) of x's dtype.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    out_features, in_features = _shape(weight)
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight ({out_features}, {in_features})")
    if gate is not None and _shape(gate) != (out_features, in_features):
        raise ValueError(f"gate {_shape(gate)} must have the weight's shape ({out_features}, {in_features})")
    for name, matrix in (("weight", weight), ("gate", gate)):
        if isinstance(matrix, torch.Tensor) and matrix.dtype != x.dtype:
            raise ValueError(f"{name} is {matrix.dtype}, x is {x.dtype}")
    if norm_weight is not None and norm_weight.shape != (in_features,):
        raise ValueError(f"norm_weight {tuple(norm_weight.shape)} must be ({in_features},)")
    if residual is not None and residual.shape != (x.shape[0], out_features):
        raise ValueError(f"residual {tuple(residual.shape)} must be ({x.shape[0]}, {out_features})")
    run = backends.resolve("skinny_linear", x.device, x.dtype, backend).load()
    out: torch.Tensor = run(x, weight, norm_weight=norm_weight, norm_eps=norm_eps, gate=gate, residual=residual)
    return out


def _shape(weight: Weight) -> tuple[int, int]:
    if isinstance(weight, PackedWeight):
        return weight.out_features, weight.in_features
    return weight.shape[0], weight.shape[1]


def reference(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    gate: Weight | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch; packed weights are unpacked to x's dtype first."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, norm_eps)
    y = F.linear(x, _matrix(weight, x.dtype))
    if gate is not None:
        y = F.silu(y) * F.linear(x, _matrix(gate, x.dtype))
    return y if residual is None else residual + y


def _matrix(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    return unpack(weight, dtype) if isinstance(weight, PackedWeight) else weight


_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_PACKED_KINDS = {"bf16": 2, "int8": 3}


def weight_operands(weight: Weight, dtype: torch.dtype) -> tuple[int, int, int]:
    """(kind, address, address of the scales) of a weight, as ``csrc/cpu/skinny_linear.h`` counts the kinds.

    Raises:
        ValueError: an unpacked weight is not contiguous or not of ``dtype``.
    """
    if isinstance(weight, PackedWeight):
        scales = 0 if weight.scales is None else weight.scales.data_ptr()
        return _PACKED_KINDS[weight.kind], weight.data.data_ptr(), scales
    if weight.dtype != dtype or not weight.is_contiguous():
        raise ValueError(f"an unpacked weight must be contiguous {dtype}; convert it once, outside the loop")
    return _DTYPES[dtype], weight.data_ptr(), 0


def _cpu(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    gate: Weight | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compiled. A row's bits depend on that row and the weights only, whatever the batch and the threads.

    Raises:
        ValueError: weight and gate are of different kinds, or a weight is not contiguous.
    """
    x = x.contiguous()
    out_features, in_features = _shape(weight)
    kind, data, scales = weight_operands(weight, x.dtype)
    gate_kind, gate_data, gate_scales = (kind, 0, 0) if gate is None else weight_operands(gate, x.dtype)
    if gate_kind != kind:
        raise ValueError("weight and gate must be packed alike")
    out = x.new_empty(x.shape[0], out_features)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    native.cpu_kernels().skinny_linear_cpu(
        x.data_ptr(), _DTYPES[x.dtype], x.shape[0], in_features, out_features,
        0 if norm_weight is None else norm_weight.data_ptr(), norm_eps, kind, data, scales, gate_data, gate_scales,
        0 if residual is None else residual.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


backends.register("skinny_linear", "reference", lambda: reference)
triton_backend.register("skinny_linear")
backends.register(
    "skinny_linear",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset(_DTYPES),
    unavailable=lambda: native.unavailable("skinny_linear_cpu"),
)
