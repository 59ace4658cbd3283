// bf16, fp16 and fp8 (e4m3) as storage: converted from and to fp32, round to nearest even, the same bits on the host
// and on every GPU. Values too large for e4m3, which has no infinity, become its largest, 448.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace gear {

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};
struct float8 {
  std::uint8_t bits;
};

namespace narrow {

// The magnitude of a finite fp32 number, rounded to `mantissa` bits with exponent bias `bias`, without the sign; not
// limited above.
GEAR_HD inline std::uint32_t round_magnitude(float magnitude, int mantissa, int bias) {
  const int dropped = 23 - mantissa;
  // Subnormal results: adding a number whose last place is theirs lets the addition round.
  const float smallest_normal = bits_float((128 - bias) << 23), place = bits_float((151 - bias - mantissa) << 23);
  if (magnitude < smallest_normal)
    return static_cast<std::uint32_t>(float_bits(magnitude + place)) - static_cast<std::uint32_t>(float_bits(place));
  const std::uint32_t bits = static_cast<std::uint32_t>(float_bits(magnitude));
  const std::uint32_t rounded = bits + ((1u << (dropped - 1)) - 1u) + ((bits >> dropped) & 1u);
  return (rounded >> dropped) - (static_cast<std::uint32_t>(127 - bias) << mantissa);
}

}  // namespace narrow

GEAR_HD inline float to_float(float x) { return x; }

GEAR_HD inline float to_float(bfloat16 x) { return bits_float(static_cast<std::int32_t>(std::uint32_t{x.bits} << 16)); }

GEAR_HD inline float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const std::int32_t sign = (x.bits & 0x8000) ? INT32_MIN : 0, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
#endif
}

GEAR_HD inline float to_float(float8 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<std::uint16_t>(x.bits)));
  return to_float(float16{static_cast<std::uint16_t>(pair)});
#else
  const std::int32_t sign = (x.bits & 0x80) ? INT32_MIN : 0, magnitude = x.bits & 0x7f;
  if (magnitude == 0x7f) return bits_float(0x7fffffff);
  return bits_float(sign | float_bits(bits_float(magnitude << 20) * 0x1p120f));
#endif
}

template <class T>
GEAR_HD T from_float(float x);

template <>
GEAR_HD inline float from_float<float>(float x) {
  return x;
}

template <>
GEAR_HD inline bfloat16 from_float<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const std::uint32_t bits = static_cast<std::uint32_t>(float_bits(x));
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
GEAR_HD inline float16 from_float<float16>(float x) {
#if defined(__CUDA_ARCH__)
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const std::uint32_t sign = (static_cast<std::uint32_t>(float_bits(x)) >> 16) & 0x8000u;
  const float magnitude = x < 0.0f ? -x : x;
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  return {static_cast<std::uint16_t>(sign | narrow::round_magnitude(magnitude, 10, 15))};
#endif
}

template <>
GEAR_HD inline float8 from_float<float8>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return {static_cast<std::uint8_t>(pair)};
#else
  const std::uint32_t sign = (static_cast<std::uint32_t>(float_bits(x)) >> 24) & 0x80u;
  const float magnitude = x < 0.0f ? -x : x;
  if (x != x) return {0x7f};
  if (magnitude >= 448.0f) return {static_cast<std::uint8_t>(sign | 0x7eu)};
  return {static_cast<std::uint8_t>(sign | narrow::round_magnitude(magnitude, 3, 7))};
#endif
}

}  // namespace gear
