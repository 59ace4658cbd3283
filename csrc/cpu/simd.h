// One vector of fp32 in the widest registers of the instruction set that a file is compiled for (see isa.h).
//
// Everything lives in namespace gear::GEAR_ISA. Sums are fused multiply-adds where the hardware has them, so values may
// differ between instruction sets, never within one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(GEAR_ISA_avx512) || defined(GEAR_ISA_avx2)
// GCC 12 takes the intrinsics' deliberately undefined operands for mistakes (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

namespace gear::GEAR_ISA {

// ---- storage types
// ---------------------------------------------------------------------------------------------------

struct bf16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
// Round to nearest, ties to even; NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return bf16{static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// ---- vectors
// ---------------------------------------------------------------------------------------------------------

#if defined(GEAR_ISA_avx512)

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
inline Vec load_first(const bf16* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n for integral n in [-126, 127].
inline Vec exp2_integral(Vec n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline Vec zero_below(Vec x, Vec bound, Vec value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), value);
}
// Bit i: lane i is > 0; that lane of `sign` is 1, otherwise -1.
inline std::uint32_t positive_bits(Vec x, Vec& sign) {
  const __mmask16 positive = _mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ);
  sign = _mm512_mask_mov_ps(splat(-1.0f), positive, splat(1.0f));
  return positive;
}

// Lane i: element 2 i of p.
inline Vec load_even(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
// Lane i: element 2 i + 1 of p.
inline Vec load_odd(const bf16* p) {
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), odd));
}

// Lane i of the result: the sum of a[i]'s lanes.
inline Vec sum_each(const Vec (&a)[kLanes]) {
  Vec pairs[8], quads[4];
  for (int i = 0; i < 8; ++i)
    pairs[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(pairs[2 * i]), y = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const Vec low = add(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88), _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  const Vec high = add(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88), _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

#elif defined(GEAR_ISA_avx2)

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec exp2_integral(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Vec zero_below(Vec x, Vec bound, Vec value) {
  return _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_NLT_UQ), value);
}
inline std::uint32_t positive_bits(Vec x, Vec& sign) {
  const Vec positive = _mm256_cmp_ps(x, zero(), _CMP_GT_OQ);
  sign = _mm256_blendv_ps(splat(-1.0f), splat(1.0f), positive);
  return static_cast<std::uint32_t>(_mm256_movemask_ps(positive));
}

inline Vec load_even(const bf16* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
}
inline Vec load_odd(const bf16* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline Vec sum_each(const Vec (&a)[kLanes]) {
  Vec pairs[4], quads[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = add(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 2; ++i) {
    const __m256d x = _mm256_castps_pd(pairs[2 * i]), y = _mm256_castps_pd(pairs[2 * i + 1]);
    quads[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  return add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}

#else

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
typedef float Vec __attribute__((vector_size(16)));
typedef std::int32_t IntVec __attribute__((vector_size(16)));

inline Vec zero() { return Vec{0, 0, 0, 0}; }
inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Vec load(const bf16* p) { return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec abs(Vec a) { return a < 0 ? -a : a; }
// Adding and taking away 1.5 * 2^23 rounds |a| < 2^22 to the nearest integer, ties to even.
inline Vec round(Vec a) {
  const Vec magic = splat(12582912.0f);
  return (a + magic) - magic;
}
inline Vec exp2_integral(Vec n) {
  const IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline Vec zero_below(Vec x, Vec bound, Vec value) { return x < bound ? zero() : value; }
inline std::uint32_t positive_bits(Vec x, Vec& sign) {
  sign = x > 0 ? splat(1.0f) : splat(-1.0f);
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<std::uint32_t>(x[i] > 0) << i;
  return bits;
}

inline Vec load_even(const bf16* p) { return Vec{to_float(p[0]), to_float(p[2]), to_float(p[4]), to_float(p[6])}; }
inline Vec load_odd(const bf16* p) { return Vec{to_float(p[1]), to_float(p[3]), to_float(p[5]), to_float(p[7])}; }

inline Vec sum_each(const Vec (&a)[kLanes]) {
  Vec sums = zero();
  for (int i = 0; i < 4; ++i) sums[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
  return sums;
}

#endif

#if !defined(GEAR_ISA_avx512)
// The first n lanes from memory, zeros behind; nothing past them is read. 0 < n < kLanes.
template <class T>
inline Vec load_first(const T* p, int n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(padded);
}
#endif

inline void store(bf16* p, Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<bf16>(lanes[i]);
}

// The sum of the lanes: halves are added until one is left.
inline float sum(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float max(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] < lanes[i + width] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

// e^x to about 1 ulp for x in [-87.3, 88]; 0 below (so e^-inf = 0), e^88 above (2^128 is no scale for p); what is no
// number stays none.
// x = n ln 2 + r with |r| <= ln(2) / 2, e^r by the degree-6 minimax polynomial of Cephes' expf, ln 2 in two parts.
inline Vec exp(Vec x) {
  const Vec lowest = splat(-87.3f);
  const Vec clamped = min(splat(88.0f), max(lowest, x));  // of two operands one of which is no number, the second
  const Vec n = round(mul(clamped, splat(1.44269504088896341f)));
  Vec r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  return zero_below(x, lowest, mul(p, exp2_integral(n)));
}

}  // namespace gear::GEAR_ISA
