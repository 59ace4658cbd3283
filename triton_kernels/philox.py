"""Philox exponential noise in Triton, bit for bit that of :mod:`gear_engine.ops.philox`.

The multiplications and additions of the logarithm must be rounded one by one. A compiler may fuse them, so the launch
disables it (``enable_fp_fusion=False``).

Runs under Triton's interpreter in the tests; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The constants of gear_engine.ops.philox, all exact in float32; the tests compare bits.
SQRT_HALF_BITS: tl.constexpr = tl.constexpr(0x3F3504F3)
LN2_HIGH: tl.constexpr = tl.constexpr(float.fromhex("0x1.6300000000000p-1"))
LN2_LOW: tl.constexpr = tl.constexpr(float.fromhex("-0x1.bd01060000000p-13"))
C0: tl.constexpr = tl.constexpr(float.fromhex("0x1.5555460000000p-2"))
C1: tl.constexpr = tl.constexpr(float.fromhex("-0x1.0000000000000p-2"))
C2: tl.constexpr = tl.constexpr(float.fromhex("0x1.99a5960000000p-3"))
C3: tl.constexpr = tl.constexpr(float.fromhex("-0x1.555f6c0000000p-3"))
C4: tl.constexpr = tl.constexpr(float.fromhex("0x1.23298e0000000p-3"))
C5: tl.constexpr = tl.constexpr(float.fromhex("-0x1.fbac040000000p-4"))
C6: tl.constexpr = tl.constexpr(float.fromhex("0x1.e73fb40000000p-4"))
C7: tl.constexpr = tl.constexpr(float.fromhex("-0x1.e0f9ec0000000p-4"))
C8: tl.constexpr = tl.constexpr(float.fromhex("0x1.16ed820000000p-4"))


@triton.jit
def exponential_from_bits(word):
    """q = -log1p(-u) of a uint32 word, u = min((float32(word) + 0.5) * 2^-32, 1 - 2^-24)."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    y = 1.0 - u
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    e = exponent.to(tl.float32)
    f = tl.where(exponent == 0, -u, m - 1.0)
    s = f * f
    r = f * C8 + C7
    r = r * f + C6
    r = r * f + C5
    r = r * f + C4
    r = r * f + C3
    r = r * f + C2
    r = r * f + C1
    r = r * f + C0
    t = (f * s) * r
    t = t + e * LN2_LOW
    t = t - s * 0.5
    return -((f + t) + e * LN2_HIGH)


@triton.jit
def exponential_noise(seed, position, token):
    """Noise of the tokens ``token`` (int32 block) of the stream ``seed`` (int64 scalar) at ``position``."""
    block = (token // 4).to(tl.uint32)
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(seed, block, zero + position.to(tl.uint32), zero, zero)
    lane = token % 4
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return exponential_from_bits(word)


@triton.jit
def _philox_kernel(seeds, positions, out, vocab_size, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    noise = exponential_noise(tl.load(seeds + image), tl.load(positions + image), token)
    tl.store(out + image.to(tl.int64) * vocab_size + token, noise, mask=token < vocab_size)


def philox(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """fp32 (B, vocab_size), the contract of :func:`gear_engine.ops.philox.reference`."""
    out = torch.empty(seeds.shape[0], vocab_size, dtype=torch.float32, device=seeds.device)
    grid = (seeds.shape[0], triton.cdiv(vocab_size, 1024))
    _philox_kernel[grid](seeds, positions, out, vocab_size, BLOCK=1024, enable_fp_fusion=False)
    return out
