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

import torch
import torch.nn.functional as F

from gear_engine.errors import ConfigError
from gear_engine.ops import backends, native, triton_backend
from gear_engine.ops.packed_weight import PackedWeight, PackKind, Weight, pack, packed_nbytes, unpack

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


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
        x.data_ptr(), _DTYPES[x.dtype], x.shape[0], in_features, out_features, _address(norm_weight), norm_eps, kind,
        data, scales, gate_data, gate_scales, _address(residual), out.data_ptr(),
    )  # fmt: skip
    return out


_CUDA_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _cuda(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    gate: Weight | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Compiled. A row's bits depend on that row and the weights only, whatever the batch.

    ``overlap``: the call may fetch weights while the kernel before it in the stream is still running; the caller
    vouches that this kernel does not write them.

    Raises:
        ConfigError: a weight is packed.
        ValueError: a weight is not contiguous.
    """
    if isinstance(weight, PackedWeight) or isinstance(gate, PackedWeight):
        raise ConfigError("packed weights are for the CPU: CUDA kernels read the weights in place")
    if not weight.is_contiguous() or not (gate is None or gate.is_contiguous()):
        raise ValueError("weights must be contiguous; make them so once, outside the loop")
    x, (out_features, in_features), rows = x.contiguous(), weight.shape, x.shape[0]
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty(rows, out_features, dtype=out_dtype or x.dtype)
    dtype, has_norm = _CUDA_DTYPES[x.dtype], norm_weight is not None
    with native.cuda_kernels(x.device) as (kernels, stream):
        scratch = kernels.skinny_linear_workspace_cuda(dtype, rows, in_features, has_norm)
        workspace = torch.empty(scratch, dtype=torch.uint8, device=x.device)
        kernels.skinny_linear_cuda(
            x.data_ptr(), dtype, rows, in_features, out_features, _address(norm_weight), norm_eps, weight.data_ptr(),
            _address(gate), _address(residual), out.data_ptr(), out.dtype == torch.float32, workspace.data_ptr(),
            overlap, stream,
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
backends.register(
    "skinny_linear",
    "cuda",
    lambda: _cuda,
    devices=frozenset({"cuda"}),
    dtypes=frozenset(_CUDA_DTYPES),
    unavailable=lambda: native.unavailable("skinny_linear_cuda"),
)
