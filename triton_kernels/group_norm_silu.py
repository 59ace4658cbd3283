"""GroupNorm and SiLU of channels-last images, in Triton: one pass over each, from moments that were taken before.

The contract is that of :mod:`gear_engine.ops.group_norm_silu`. A program owns a strip of four rows of some whole
groups. It adds up those groups' moments itself: a quarter of its strip's bytes in a square image of 4 channels per
group, and they come from the cache; a kernel of their own would cost a launch. Mean, variance, weight and bias become
y = x * scale + shift per channel, in fp64 up to the last rounding. Every order is fixed by the image's size: the result
has the same bits in any batch.

Runs under Triton's interpreter in the tests; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gear_engine.triton_kernels.residual_moments import channels_of, lanes_of

#: Image rows of a program, its lanes, pixels of a block, and rows of moments that are added at a time.
_ROWS = 4
_LANES = 32
_PIXELS = 64
_MOMENTS = 32


@triton.jit
def _norm_kernel(
    x,
    moments,
    weight,
    bias,
    out,
    pixels,
    strip,
    channels,
    groups,
    image_rows,
    count,
    eps,
    affine_stride,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """`pixels` per image, `strip` of them per program; `count` numbers per group; `affine_stride` 0 or `channels`."""
    block = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)

    # Moments of the groups, rows in order.
    group = block * GROUPS + tl.arange(0, GROUPS)
    first = tl.full([MOMENTS, GROUPS], 0.0, tl.float64)
    second = tl.full([MOMENTS, GROUPS], 0.0, tl.float64)
    for start in range(0, image_rows, MOMENTS):
        row = start + tl.arange(0, MOMENTS)
        mask = (row < image_rows)[:, None] & (group < groups)[None, :]
        place = moments + ((image * image_rows + row)[:, None] * groups + group[None, :]) * 2
        first += tl.load(place, mask=mask, other=0.0)
        second += tl.load(place + 1, mask=mask, other=0.0)
    mean = tl.sum(first, 0) / count
    variance = tl.maximum(tl.sum(second, 0) / count - mean * mean, 0.0)

    # Scale and shift of the channels.
    channel, live = channels_of(block, channels, PER_GROUP, GROUPS, LANES)
    inverse = (1.0 / tl.sqrt(variance + eps))[:, None]
    wide_scale = tl.reshape(tl.broadcast_to(inverse, [GROUPS, LANES]), [GROUPS * LANES])
    if HAS_WEIGHT:
        wide_scale *= tl.load(weight + image * affine_stride + channel, mask=live, other=0.0).to(tl.float64)
    wide_shift = -tl.reshape(tl.broadcast_to(mean[:, None], [GROUPS, LANES]), [GROUPS * LANES]) * wide_scale
    if HAS_BIAS:
        wide_shift += tl.load(bias + image * affine_stride + channel, mask=live, other=0.0).to(tl.float64)
    scale = wide_scale.to(tl.float32)[None, :]
    shift = wide_shift.to(tl.float32)[None, :]

    # The strip.
    begin = tl.program_id(0) * strip
    for start in range(0, strip, PIXELS):
        pixel = begin + start + tl.arange(0, PIXELS)
        mask = ((pixel < pixels) & (pixel < begin + strip))[:, None] & live[None, :]
        place = (image * pixels + pixel)[:, None] * channels + channel[None, :]
        y = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * scale + shift
        if SILU:
            y /= 1.0 + tl.exp(-y)
        tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)


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
    """Launches the kernel; shapes and dtypes were checked by the op.

    Raises:
        ValueError: an operand is not contiguous.
    """
    if not all(t is None or t.is_contiguous() for t in (x, moments, weight, bias, out)):
        raise ValueError("x, moments, weight, bias and out must be contiguous")
    if not x.numel():
        return
    height, width, channels = x.shape[-3:]
    image_rows, groups, _ = moments.shape[-3:]
    images = x.shape[0] if x.dim() == 4 else 1
    per_group = channels // groups
    per_program, lanes = lanes_of(per_group, _LANES)
    per_image = any(affine is not None and affine.dim() == 2 for affine in (weight, bias))
    _norm_kernel[(triton.cdiv(height, _ROWS), triton.cdiv(groups, per_program), images)](
        x,
        moments,
        x if weight is None else weight,
        x if bias is None else bias,
        out,
        height * width,
        _ROWS * width,
        channels,
        groups,
        image_rows,
        image_rows * width * per_group,
        eps,
        channels if per_image else 0,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        SILU=silu,
        PER_GROUP=per_group,
        GROUPS=per_program,
        LANES=lanes,
        PIXELS=_PIXELS,
        MOMENTS=_MOMENTS,
        num_warps=8,
    )
