"""Counter-based random numbers: Philox4x32-10 and an exponential variate, bit for bit the same in every backend.

An image's stream is keyed by its seed; the noise of token v at image position t depends on (seed, t, v) and on nothing
else::

    counter = (v // 4, t, 0, 0)
    key     = (seed mod 2^32, seed div 2^32)
    x       = word v % 4 of philox4x32_10(counter, key)                        32 bits
    u       = min((float32(x) + 0.5) * 2^-32, 1 - 2^-24)                       fp32, in (0, 1)
    q       = -log1p(-u)                                                       fp32, standard exponential

``argmax_v p_v / q_v`` then draws v with probability p_v (exponential races).

The logarithm is spelled out, so that torch, C++ and CUDA agree bit for bit: every multiplication and addition below is
an fp32 operation rounded on its own, never fused. With y = 1 - u = m * 2^e, sqrt(1/2) <= m < sqrt(2)::

    f = m - 1             (f = -u when e = 0: small u keep all their bits)
    s = f * f
    r = LOG1P[8];  r = r * f + LOG1P[k]  for k = 7 ... 0
    t = (f * s) * r
    t = t + e * LN2_LOW
    t = t - 0.5 * s
    q = -((f + t) + e * LN2_HIGH)

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), for Philox; the polynomial is a
least-squares fit at Chebyshev nodes, weighted for relative error.
"""

from __future__ import annotations

from typing import Final

import torch

from gear_engine.ops import backends, native, triton_backend

__all__ = ["LN2_HIGH", "LN2_LOW", "LOG1P", "SQRT_HALF_BITS", "exponential", "philox4x32", "reference", "uniform"]

#: Multipliers and key increments of Philox4x32.
MULTIPLIER_0: Final = 0xD2511F53
MULTIPLIER_1: Final = 0xCD9E8D57
WEYL_0: Final = 0x9E3779B9
WEYL_1: Final = 0xBB67AE85
ROUNDS: Final = 10

#: Bits of the largest float32 below sqrt(1/2), plus one: where the mantissa is split.
SQRT_HALF_BITS: Final = 0x3F3504F3

#: log1p(f) = f - f^2 / 2 + f^3 * sum_k LOG1P[k] f^k on [sqrt(1/2) - 1, sqrt(2) - 1]; exact float32 numbers.
LOG1P: Final = (
    float.fromhex("0x1.555546p-2"),
    float.fromhex("-0x1.000000p-2"),
    float.fromhex("0x1.99a596p-3"),
    float.fromhex("-0x1.555f6cp-3"),
    float.fromhex("0x1.23298ep-3"),
    float.fromhex("-0x1.fbac04p-4"),
    float.fromhex("0x1.e73fb4p-4"),
    float.fromhex("-0x1.e0f9ecp-4"),
    float.fromhex("0x1.16ed82p-4"),
)

#: ln 2 = LN2_HIGH + LN2_LOW; e * LN2_HIGH is exact for the exponents that occur (at most 24 in magnitude).
LN2_HIGH: Final = float.fromhex("0x1.63p-1")
LN2_LOW: Final = float.fromhex("-0x1.bd0106p-13")

_WORD: Final = 0xFFFFFFFF


def _multiply(a: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps modulo 2^64, which keeps all the bits."""
    product = a * multiplier
    return (product >> 32) & _WORD, product & _WORD


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 on 32-bit words held in int64 tensors (any broadcastable shapes)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIER_0)
        high1, low1 = _multiply(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL_0) & _WORD, (k1 + WEYL_1) & _WORD
    return c0, c1, c2, c3


def uniform(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """u of the module's formula: fp32 (B, vocab_size) in (0, 1 - 2^-24]."""
    blocks = torch.arange((vocab_size + 3) // 4, device=seeds.device).expand(seeds.shape[0], -1)  # [B, V / 4]
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    key = ((seeds & _WORD)[:, None], (seeds >> 32 & _WORD)[:, None])
    words = philox4x32((blocks, positions[:, None].expand_as(blocks), zero, zero), key)
    x = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]  # [B, V]
    return ((x.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def exponential(u: torch.Tensor) -> torch.Tensor:
    """-log1p(-u) for fp32 u in (0, 1 - 2^-24], by the module's formula; relative error below 1e-6."""
    y = 1.0 - u
    # Subtracting the bits of sqrt(1/2) moves the exponent field's carry to where m crosses it.
    exponent = (y.view(torch.int32) - SQRT_HALF_BITS) >> 23
    m = (y.view(torch.int32) - (exponent << 23)).view(torch.float32)
    e = exponent.to(torch.float32)
    f = torch.where(exponent == 0, -u, m - 1.0)
    s = f * f
    r = torch.full_like(f, LOG1P[8])
    for coefficient in LOG1P[7::-1]:
        r = r * f
        r = r + coefficient
    t = f * s
    t = t * r
    low = e * LN2_LOW
    t = t + low
    half = s * 0.5
    t = t - half
    high = e * LN2_HIGH
    return -((f + t) + high)


def reference(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Exponential noise of one step.

    Args:
        seeds: int64 (B,), in [0, 2^63): the images' keys.
        positions: int64 (B,), in [0, 2^32): image-token index that is drawn.
        vocab_size: V.

    Returns:
        fp32 (B, V), all positive and finite.
    """
    return exponential(uniform(seeds, positions, vocab_size))


def _cpu(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Compiled: ``csrc/common/philox.h`` and ``exponential.h``."""
    noise = torch.empty(seeds.shape[0], vocab_size, dtype=torch.float32)
    kernels = native.cpu_kernels()
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        kernels.philox_cpu(seed, position, vocab_size, noise[row].data_ptr())
    return noise


backends.register("philox", "reference", lambda: reference)
backends.register(
    "philox",
    "cpu",
    lambda: _cpu,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({torch.float32}),
    unavailable=lambda: native.unavailable("philox_cpu"),
)
triton_backend.register("philox", frozenset({torch.float32}))
