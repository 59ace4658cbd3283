// A standard exponential variate from 32 random bits, the same bits on every backend: each multiplication and addition
// below is rounded on its own (compile with -ffp-contract=off, or --fmad=false). The formula and its coefficients are
// those of ops/philox.py.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace gear {

// u = min((float(bits) + 0.5) 2^-32, 1 - 2^-24)
GEAR_HD inline float unit_uniform(std::uint32_t bits) {
  const float u = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  return u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
}

// -log1p(-u) for u in (0, 1 - 2^-24]
GEAR_HD inline float exponential(float u) {
  const float y = 1.0f - u;
  // Subtracting the bits of sqrt(1/2) moves the exponent field's carry to where the mantissa crosses it.
  const std::int32_t exponent = (float_bits(y) - 0x3F3504F3) >> 23;
  const float m = bits_float(float_bits(y) - exponent * (1 << 23));
  const float e = static_cast<float>(exponent);
  const float f = exponent == 0 ? -u : m - 1.0f;
  const float s = f * f;
  float r = 0x1.16ed82p-4f;
  r = r * f + -0x1.e0f9ecp-4f;
  r = r * f + 0x1.e73fb4p-4f;
  r = r * f + -0x1.fbac04p-4f;
  r = r * f + 0x1.23298ep-3f;
  r = r * f + -0x1.555f6cp-3f;
  r = r * f + 0x1.99a596p-3f;
  r = r * f + -0x1.000000p-2f;
  r = r * f + 0x1.555546p-2f;
  float t = f * s;
  t = t * r;
  t = t + e * -0x1.bd0106p-13f;
  t = t - s * 0.5f;
  return -((f + t) + e * 0x1.63p-1f);
}

}  // namespace gear
