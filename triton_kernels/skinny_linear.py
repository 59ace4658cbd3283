"""A linear layer for few rows with RMSNorm before and SwiGLU or a residual after, in Triton.

The contract is that of :mod:`gear_engine.ops.skinny_linear` for unpacked weights. One program owns BLOCK_OUT outputs
of up to 16 rows and walks the whole reduction in fixed blocks: no split over K, no choice that follows the number of
rows, so a row's bits do not depend on its batch. The tensor cores' smallest tile has 16 rows; fewer cost as many bytes.

The norm is recomputed by every program: x is at most a few hundred KB and stays in L2, while a kernel of its own would
cost a launch per layer.

Runs under Triton's interpreter in the tests; not yet timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS: tl.constexpr = tl.constexpr(16)


# One binary for every number of rows: Triton would compile others for 1 row and for multiples of 16.
@triton.jit(do_not_specialize=["rows"])
def _skinny_linear_kernel(
    x,
    weight,
    gate,
    norm_weight,
    residual,
    out,
    rows,
    in_features,
    out_features,
    stride_x,
    stride_weight,
    stride_gate,
    stride_residual,
    norm_eps,
    HAS_NORM: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    dtype = x.dtype.element_ty
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    live_row = row < rows
    live_column = column < out_features
    lane = tl.arange(0, BLOCK_IN)
    x_rows = x + row[:, None].to(tl.int64) * stride_x

    # Phase 1: the norm's scale, in fp32.
    scale = tl.full([ROWS], 1.0, tl.float32)
    if HAS_NORM:
        squares = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, in_features, BLOCK_IN):
            k = start + lane
            block = tl.load(x_rows + k[None, :], mask=live_row[:, None] & (k < in_features)[None, :], other=0.0)
            block = block.to(tl.float32)
            squares += tl.sum(block * block, axis=1)
        scale = tl.rsqrt(squares / in_features + norm_eps)

    # Phase 2: the product(s), weights read once.
    accumulator = tl.zeros([ROWS, BLOCK_OUT], dtype=tl.float32)
    gated = tl.zeros([ROWS, BLOCK_OUT], dtype=tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        k = start + lane
        live_k = k < in_features
        block = tl.load(x_rows + k[None, :], mask=live_row[:, None] & live_k[None, :], other=0.0)
        if HAS_NORM:
            # Rounded to the activations' dtype before the weight is applied, as the model defines it.
            w = tl.load(norm_weight + k, mask=live_k, other=0.0)
            block = ((block.to(tl.float32) * scale[:, None]).to(dtype) * w[None, :]).to(dtype)
        live = live_k[:, None] & live_column[None, :]
        offsets = column[None, :].to(tl.int64)
        matrix = tl.load(weight + offsets * stride_weight + k[:, None], mask=live, other=0.0)  # [BLOCK_IN, BLOCK_OUT]
        accumulator = tl.dot(block, matrix, accumulator, input_precision=PRECISION)
        if HAS_GATE:
            matrix = tl.load(gate + offsets * stride_gate + k[:, None], mask=live, other=0.0)
            gated = tl.dot(block, matrix, gated, input_precision=PRECISION)

    # Phase 3: SwiGLU, residual, store; each step rounded to the activations' dtype as separate modules would.
    result = accumulator.to(dtype).to(tl.float32)
    if HAS_GATE:
        result = (result * tl.sigmoid(result)).to(dtype).to(tl.float32) * gated.to(dtype).to(tl.float32)
        result = result.to(dtype).to(tl.float32)
    live = live_row[:, None] & live_column[None, :]
    if HAS_RESIDUAL:
        added = tl.load(residual + row[:, None].to(tl.int64) * stride_residual + column[None, :], mask=live, other=0.0)
        result += added.to(tl.float32)
    tl.store(out + row[:, None].to(tl.int64) * out_features + column[None, :], result.to(dtype), mask=live)


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launches the kernel; the arguments were checked by :func:`gear_engine.ops.skinny_linear.skinny_linear`."""
    if not isinstance(weight, torch.Tensor) or not (gate is None or isinstance(gate, torch.Tensor)):
        raise ValueError("the triton backend multiplies by plain weights; packed ones are the cpu backend's")
    operands = [x, weight, *(t for t in (gate, residual) if t is not None)]
    if any(t.stride(-1) != 1 for t in operands):
        raise ValueError("the last dimension of x, weight, gate and residual must be contiguous")
    rows, in_features = x.shape
    out_features = weight.shape[0]
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    block_out = 16 if x.dtype == torch.float32 else 32
    _skinny_linear_kernel[(triton.cdiv(out_features, block_out), triton.cdiv(rows, ROWS.value))](
        x,
        weight,
        x if gate is None else gate,
        x if norm_weight is None else norm_weight,
        x if residual is None else residual,
        out,
        rows,
        in_features,
        out_features,
        x.stride(0),
        weight.stride(0),
        0 if gate is None else gate.stride(0),
        0 if residual is None else residual.stride(0),
        norm_eps,
        HAS_NORM=norm_weight is not None,
        HAS_GATE=gate is not None,
        HAS_RESIDUAL=residual is not None,
        PRECISION="ieee",
        BLOCK_OUT=block_out,
        BLOCK_IN=128,
        num_warps=4,
    )
    return out
