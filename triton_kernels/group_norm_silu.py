"""GroupNorm and SiLU of channels-last rows, in Triton: one pass over the image, from moments that were taken before.

The contract is that of :mod:`gear_engine.ops.group_norm_silu`. A first, tiny kernel folds mean, variance, weight and
bias into y = x * scale + shift per channel, in fp64 up to the last rounding; the second applies it, element by element,
reading and writing each number once.

Runs under Triton's interpreter in the tests; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _fold_kernel(
    moments,
    weight,
    bias,
    affine,
    image_rows,
    groups,
    per_group,
    count,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """affine [2, C]: scale and shift of one group's channels; `count` numbers per group."""
    group = tl.program_id(0)
    first = tl.zeros([BLOCK_ROWS], dtype=tl.float64)
    second = tl.zeros([BLOCK_ROWS], dtype=tl.float64)
    for start in range(0, image_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        place = moments + (row * groups + group) * 2
        first += tl.load(place, mask=row < image_rows, other=0.0)
        second += tl.load(place + 1, mask=row < image_rows, other=0.0)
    mean = tl.sum(first) / count
    variance = tl.maximum(tl.sum(second) / count - mean * mean, 0.0)

    lane = tl.arange(0, LANES)
    live = lane < per_group
    channel = group * per_group + lane
    scale = tl.zeros([LANES], dtype=tl.float64) + 1.0 / tl.sqrt(variance + eps)
    if HAS_WEIGHT:
        scale *= tl.load(weight + channel, mask=live, other=0.0).to(tl.float64)
    shift = -mean * scale
    if HAS_BIAS:
        shift += tl.load(bias + channel, mask=live, other=0.0).to(tl.float64)
    tl.store(affine + channel, scale.to(tl.float32), mask=live)
    tl.store(affine + groups * per_group + channel, shift.to(tl.float32), mask=live)


@triton.jit
def _apply_kernel(x, affine, out, numel, channels, SILU: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = place < numel
    channel = place % channels
    scale = tl.load(affine + channel, mask=live, other=0.0)
    shift = tl.load(affine + channels + channel, mask=live, other=0.0)
    y = tl.load(x + place, mask=live, other=0.0).to(tl.float32) * scale + shift
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=live)


def group_norm_silu(
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    eps: float = 1e-6,
    silu: bool = True,
) -> None:
    """Launches the kernels; shapes and dtypes were checked by the op.

    Raises:
        ValueError: an operand is not contiguous.
    """
    if not all(t is None or t.is_contiguous() for t in (x, moments, weight, bias, out)):
        raise ValueError("x, moments, weight, bias and out must be contiguous")
    channels = x.shape[2]
    image_rows, groups, _ = moments.shape
    per_group = channels // groups
    affine = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    _fold_kernel[(groups,)](
        moments,
        affine if weight is None else weight,
        affine if bias is None else bias,
        affine,
        image_rows,
        groups,
        per_group,
        image_rows * x.shape[1] * per_group,
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=128,
        LANES=triton.next_power_of_2(per_group),
        num_warps=1,
    )
    if x.numel():
        block = 1024
        _apply_kernel[(triton.cdiv(x.numel(), block),)](
            x, affine, out, x.numel(), channels, SILU=silu, BLOCK=block, num_warps=4
        )
