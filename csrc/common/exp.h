// e^x in fp32, the same bits on the host and on a GPU, and those of exp() in cpu/simd.h where the CPU has fused
// multiply-adds: x = n ln 2 + r with |r| <= ln(2) / 2, e^r by the degree-6 minimax polynomial of Cephes' expf, ln 2 in
// two parts. About 1 ulp for x in [-87.3, 88]; 0 below (so e^-inf = 0), e^88 above;
// what is no number stays none.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace gear {

GEAR_HD inline float exp_fp32(float x) {
  constexpr float kLowest = -87.3f;
  const float above = x >= kLowest ? x : kLowest, clamped = above < 88.0f ? above : 88.0f;
  const float n = rintf(clamped * 1.44269504088896341f);
  float r = fmaf(n, -0.693359375f, clamped);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  const float power = p * bits_float((static_cast<std::int32_t>(n) + 127) << 23);
  return x >= kLowest ? power : x < kLowest ? 0.0f : x;
}

}  // namespace gear
