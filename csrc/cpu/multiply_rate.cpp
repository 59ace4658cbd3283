// Twelve sums, so that no step waits for the one before: the products that the instruction set offers and nothing else.
// Sums start from numbers that the compiler cannot know, or it would make equal ones once.
#include "cpu/multiply_rate.h"

#include "cpu/simd.h"
#include "cpu/simd_int8.h"

namespace gear::GEAR_ISA {
namespace {

constexpr int kSums = 12;

#if defined(GEAR_ISA_avx2) || defined(GEAR_ISA_avx512)
double multiply_f32(std::int64_t steps, float* operands) {
  const Vec a = load(operands), b = load(operands + kLanes);
  Vec total[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) total[i] = splat(operands[i]);
  for (std::int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) total[i] = fma(a, b, total[i]);
  Vec joined = zero();
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) joined = add(joined, total[i]);
  store(operands, joined);
  return static_cast<double>(steps) * kSums * kLanes;
}
#endif

#if defined(GEAR_ISA_avx2)
double multiply_int8(std::int64_t steps, float* operands) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operands));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operands + kLanes));
  __m256i total[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) total[i] = _mm256_set1_epi32(static_cast<int>(operands[i]));
  for (std::int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) add_products(a, b, total[i]);
  __m256i joined = _mm256_setzero_si256();
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) joined = _mm256_xor_si256(joined, total[i]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(operands), joined);
  return static_cast<double>(steps) * kSums * 16;
}
#elif defined(GEAR_ISA_avx512)
__attribute__((target("avx512vnni"))) double multiply_int8(std::int64_t steps, float* operands) {
  const __m512i a = _mm512_loadu_si512(operands), b = _mm512_loadu_si512(operands + kLanes);
  __m512i total[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) total[i] = _mm512_set1_epi32(static_cast<int>(operands[i]));
  for (std::int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) total[i] = _mm512_dpbusd_epi32(total[i], a, b);
  __m512i joined = _mm512_setzero_si512();
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) joined = _mm512_xor_si512(joined, total[i]);
  _mm512_storeu_si512(operands, joined);
  return static_cast<double>(steps) * kSums * 64;
}

__attribute__((target("avx512bf16"))) double multiply_bf16(std::int64_t steps, float* operands) {
  const __m512bh a = (__m512bh)_mm512_loadu_si512(operands), b = (__m512bh)_mm512_loadu_si512(operands + kLanes);
  __m512 total[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) total[i] = splat(operands[i]);
  for (std::int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) total[i] = _mm512_dpbf16_ps(total[i], a, b);
  __m512 joined = _mm512_setzero_ps();
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) joined = _mm512_add_ps(joined, total[i]);
  _mm512_storeu_ps(operands, joined);
  return static_cast<double>(steps) * kSums * 32;
}
#endif

}  // namespace

double multiply_steps([[maybe_unused]] Multiplied multiplied, [[maybe_unused]] std::int64_t steps,
                      [[maybe_unused]] float* operands) {
#if defined(GEAR_ISA_avx2) || defined(GEAR_ISA_avx512)
  if (multiplied == Multiplied::f32) return multiply_f32(steps, operands);
#endif
#if defined(GEAR_ISA_avx2)
  if (multiplied == Multiplied::int8) return multiply_int8(steps, operands);
#elif defined(GEAR_ISA_avx512)
  if (multiplied == Multiplied::int8 && has_avx512_vnni()) return multiply_int8(steps, operands);
  if (multiplied == Multiplied::bf16 && has_avx512_bf16()) return multiply_bf16(steps, operands);
#endif
  return 0.0;
}

}  // namespace gear::GEAR_ISA
