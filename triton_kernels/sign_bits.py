"""Lookup-free quantization in Triton: signs, and the index that their bits make.

The contract is that of :mod:`gear_engine.ops.sign_bits`. One program takes BLOCK groups of channels and all channels of
each; bytes are all that it costs.

Runs under Triton's interpreter in the tests; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


# One binary for every number of groups.
@triton.jit(do_not_specialize=["pairs", "stride_row", "stride_channel"])
def _sign_bits_kernel(
    z,
    indices,
    signs,
    pairs,
    stride_row,
    stride_channel,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # row * GROUPS + group
    channel = tl.arange(0, LANES)
    live = (pair < pairs)[:, None] & (channel < WIDTH)[None, :]
    place = (pair // GROUPS * stride_row)[:, None] + (
        (pair % GROUPS * WIDTH)[:, None] + channel[None, :]
    ) * stride_channel
    positive = tl.load(z + place, mask=live, other=0.0).to(tl.float32) > 0  # [BLOCK, LANES]; false for NaN
    bits = positive.to(tl.int64) << channel[None, :].to(tl.int64)
    tl.store(indices + pair, tl.sum(bits, axis=1), mask=pair < pairs)
    tl.store(signs + pair[:, None] * WIDTH + channel[None, :], tl.where(positive, 1.0, -1.0), mask=live)


def sign_bits(z: torch.Tensor, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel; the arguments were checked by :func:`gear_engine.ops.sign_bits.sign_bits`."""
    rows, channels = z.shape
    width = channels // groups
    indices = torch.empty(rows, groups, dtype=torch.int64, device=z.device)
    signs = torch.empty(rows, channels, dtype=z.dtype, device=z.device)
    block = 128
    if rows:
        _sign_bits_kernel[(triton.cdiv(rows * groups, block),)](
            z,
            indices,
            signs,
            rows * groups,
            *z.stride(),
            GROUPS=groups,
            WIDTH=width,
            LANES=triton.next_power_of_2(width),
            BLOCK=block,
            num_warps=4,
        )
    return indices, signs
