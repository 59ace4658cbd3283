// e4m3 numbers and their fp16 scales as vectors, and the entry of an fp8 cache: see ops/decode_attention.py.
//
// The bits of an e4m3 number, moved to where fp16 has its exponent and mantissa, are fp16's of 1 / 256 of it,
// subnormals included; F16C widens those. load() therefore returns x / kE4m3Unit, and who multiplies by a scale
// multiplies by the unit too, which is exact. (What is no number, 0x7f, has an infinite scale and is found by that.)
#pragma once

#include "common/narrow_floats.h"
#include "cpu/simd.h"

namespace gear::GEAR_ISA {

constexpr float kE4m3Unit = 256.0f;

#if defined(GEAR_ISA_avx512)

inline Vec widen_e4m3(__m128i bytes) {
  const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(static_cast<short>(0xbf80))));
}
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load(const float8* p) { return widen_e4m3(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load_first(const float8* p, int n) { return widen_e4m3(_mm_maskz_loadu_epi8(first_lanes(n), p)); }
inline Vec load(const float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load_first(const float16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

#elif defined(GEAR_ISA_avx2)

inline Vec load(const float8* p) {
  const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(static_cast<short>(0xbf80))));
}
inline Vec load(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

#else

inline Vec load(const float8* p) {
  IntVec bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const IntVec magnitude = bits & 0x7f;
  // Subnormals are units of 2^-9; others get fp32's exponent bias, less 8 for the unit.
  const Vec subnormal = __builtin_convertvector(magnitude, Vec) * 0x1p-17f;
  const IntVec normal = (magnitude << 20) + (112 << 23);
  IntVec found;
  std::memcpy(&found, &subnormal, sizeof found);
  found = (magnitude < 8 ? found : normal) | (bits & 0x80) << 24;
  Vec x;
  std::memcpy(&x, &found, sizeof x);
  return x;
}
inline Vec load(const float16* p) {
  return Vec{gear::to_float(p[0]), gear::to_float(p[1]), gear::to_float(p[2]), gear::to_float(p[3])};
}

#endif

#if !defined(GEAR_ISA_avx512)
inline Vec load_first(const float8* p, int n) {
  float8 padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<std::size_t>(n));
  return load(padded);
}
inline Vec load_first(const float16* p, int n) {
  float16 padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<std::size_t>(n) * 2);
  return load(padded);
}
#endif

// weights[j] *= factor scales[j] for j < n, whole vectors of weights at a time. A scale that is infinite is no number:
// the entry holds one that was not finite.
inline void apply_scales(float* weights, const float16* scales, int n, float factor) {
  for (int j = 0; j < n; j += kLanes) {
    const Vec scale = n - j < kLanes ? load_first(scales + j, n - j) : load(scales + j);
    const Vec finite = add(scale, sub(scale, scale));
    store(weights + j, mul(load(weights + j), mul(finite, splat(factor))));
  }
}

// kLanes numbers rounded to e4m3, ties to even; too large ones become 448. In the compiler's vectors, for every
// instruction set.
inline void store(float8* p, Vec x) {
  typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
  typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Vec top = min(abs(x), splat(448.0f)), shifted = add(top, splat(0x1p14f));
  Ints bits, magnitude, subnormal;
  std::memcpy(&bits, &x, sizeof bits);
  std::memcpy(&magnitude, &top, sizeof magnitude);
  std::memcpy(&subnormal, &shifted, sizeof subnormal);
  // Subnormals are units of 2^-9, the last place of 2^14: the addition has rounded them.
  subnormal -= float_bits(0x1p14f);
  const Ints normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  Ints rounded = magnitude < float_bits(0x1p-6f) ? subnormal : normal;
  rounded = (bits & 0x7fffffff) > 0x7f800000 ? Ints{} + 0x7f : rounded;
  const Bytes bytes = __builtin_convertvector(rounded | ((bits >> 24) & 0x80), Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
}

// The entry of x (head_dim, then zeros up to whole vectors): scale = max|x| / 448 in fp16, x / scale in e4m3; zeros if
// the scale is zero or no number. `entry` has room for whole vectors.
inline void quantize_entry(const float* x, std::int64_t head_dim, float8* entry, float16* scale) {
  std::int32_t largest = 0;  // compared as integers, what is no number is the largest
  for (std::int64_t i = 0; i < head_dim; ++i) {
    const std::int32_t magnitude = float_bits(x[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = gear::from_float<float16>(bits_float(largest) / 448.0f);
  const float divisor = gear::to_float(*scale);
  for (std::int64_t i = 0; i < head_dim; i += kLanes)
    store(entry + i, divisor > 0.0f ? div(load(x + i), splat(divisor)) : zero());
}

}  // namespace gear::GEAR_ISA
