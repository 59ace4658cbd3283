"""Sums into the residual stream with the moments of the next group norm, in Triton: one pass over the image.

The contract is that of :mod:`gear_engine.ops.residual_moments`. A program owns one image row of some whole groups,
walks along it in blocks of pixels and adds in fp64, in an order that the width and the channels fix: a row's moments
have the same bits in any batch. At 256 x 256 x 128 one image makes 256 programs of 256 threads.

Runs under Triton's interpreter in the tests; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Pixels of a block, and lanes (channels, each group padded to a power of two) of a program.
_PIXELS = 16
_LANES = 128


@triton.jit
def channels_of(block, channels, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """The channel of each lane of the block-th GROUPS groups of LANES lanes, and whether there is one."""
    lane = tl.arange(0, GROUPS * LANES)
    if PER_GROUP == LANES:
        # The compiler sees that neighbours lie side by side, and moves several at a time.
        channel = block * (GROUPS * LANES) + lane
        return channel, channel < channels
    else:
        channel = (block * GROUPS + lane // LANES) * PER_GROUP + lane % LANES
        return channel, (lane % LANES < PER_GROUP) & (channel < channels)


@triton.jit
def _moments_kernel(
    source,
    residual,
    moments,
    width,
    channels,
    groups,
    HAS_RESIDUAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PHASES: tl.constexpr,
    OFFSET: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    y = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    channel, live = channels_of(block, channels, PER_GROUP, GROUPS, LANES)
    total = tl.full([PIXELS, GROUPS * LANES], 0.0, tl.float64)
    squares = tl.full([PIXELS, GROUPS * LANES], 0.0, tl.float64)
    for start in range(0, width, PIXELS):
        x = start + tl.arange(0, PIXELS)
        mask = (x < width)[:, None] & live[None, :]
        place = (y * width + x)[:, None] * channels + channel[None, :]
        if PHASES:
            pixel = (y // 2 + (y % 2) * OFFSET) * (width // 2 + OFFSET) + x // 2 + (x % 2) * OFFSET
            phase = 2 * (y % 2) + x % 2
            value = tl.load(source + (pixel * 4 + phase)[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        else:
            value = tl.load(source + place, mask=mask, other=0.0)
        value = value.to(tl.float32)
        if HAS_RESIDUAL:
            if ACCUMULATE:
                value += tl.load(residual + place, mask=mask, other=0.0)
            tl.store(residual + place, value, mask=mask)
        wide = value.to(tl.float64)
        total += wide
        squares += wide * wide
    group = block * GROUPS + tl.arange(0, GROUPS)
    place = moments + (y * groups + group) * 2
    tl.store(place, tl.sum(tl.reshape(tl.sum(total, 0), [GROUPS, LANES]), 1), mask=group < groups)
    tl.store(place + 1, tl.sum(tl.reshape(tl.sum(squares, 0), [GROUPS, LANES]), 1), mask=group < groups)


def lanes_of(per_group: int, lanes: int) -> tuple[int, int]:
    """(groups of a program, lanes per group), powers of two: about ``lanes`` in all, one group at least."""
    per = triton.next_power_of_2(per_group)
    return max(1, lanes // per), per


def residual_moments(
    source: torch.Tensor,
    residual: torch.Tensor | None,
    moments: torch.Tensor,
    *,
    accumulate: bool = False,
    phase_offset: int | None = None,
) -> None:
    """Launches the kernel; shapes and dtypes were checked by the op.

    Raises:
        ValueError: an operand is not contiguous.
    """
    if not all(t is None or t.is_contiguous() for t in (source, residual, moments)):
        raise ValueError("source, residual and moments must be contiguous")
    height, groups, _ = moments.shape
    width, channels = (source if residual is None else residual).shape[1:]
    per_group = channels // groups
    per_program, lanes = lanes_of(per_group, _LANES)
    _moments_kernel[(height, triton.cdiv(groups, per_program))](
        source,
        source if residual is None else residual,
        moments,
        width,
        channels,
        groups,
        HAS_RESIDUAL=residual is not None,
        ACCUMULATE=accumulate,
        PHASES=phase_offset is not None,
        OFFSET=phase_offset or 0,
        PER_GROUP=per_group,
        GROUPS=per_program,
        LANES=lanes,
        PIXELS=_PIXELS,
        num_warps=8,
    )
