// Elements of tensors whose dtype is known at run time, and whole 16-byte words of a type known at compile time, as
// fp32.
#pragma once

#include <cstdint>

#include "common/narrow_floats.h"
#include "cuda/platform.cuh"

namespace gear::cuda {

enum class Dtype : int { f32, bf16, f16, fp8 };

constexpr std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::fp8 ? 1 : 2; }

// The functions below take fp32, bf16 and fp16.
__device__ inline float load_element(const void* data, Dtype dtype, std::int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::bf16) return to_float(static_cast<const bfloat16*>(data)[i]);
  return to_float(static_cast<const float16*>(data)[i]);
}

__device__ inline void store_element(void* data, Dtype dtype, std::int64_t i, float x) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(data)[i] = x;
  } else if (dtype == Dtype::bf16) {
    static_cast<bfloat16*>(data)[i] = from_float<bfloat16>(x);
  } else {
    static_cast<float16*>(data)[i] = from_float<float16>(x);
  }
}

__device__ inline float round_to(Dtype dtype, float x) {
  if (dtype == Dtype::f32) return x;
  return dtype == Dtype::bf16 ? to_float(from_float<bfloat16>(x)) : to_float(from_float<float16>(x));
}

// Two e4m3 numbers, the first in the low byte.
__device__ inline void widen_fp8_pair(std::uint16_t bits, float& low, float& high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(bits));
  low = to_float(float16{static_cast<std::uint16_t>(pair)});
  high = to_float(float16{static_cast<std::uint16_t>(pair >> 16)});
#else
  low = to_float(float8{static_cast<std::uint8_t>(bits)});
  high = to_float(float8{static_cast<std::uint8_t>(bits >> 8)});
#endif
}

template <class T>
__device__ void widen(uint4 word, float (&x)[16 / sizeof(T)]) {
  const std::uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const std::uint16_t low = static_cast<std::uint16_t>(words[w]), high = static_cast<std::uint16_t>(words[w] >> 16);
    if constexpr (sizeof(T) == 4) {
      x[w] = bits_float(static_cast<std::int32_t>(words[w]));
    } else if constexpr (sizeof(T) == 2) {
      x[2 * w] = to_float(T{low});
      x[2 * w + 1] = to_float(T{high});
    } else {
      widen_fp8_pair(low, x[4 * w], x[4 * w + 1]);
      widen_fp8_pair(high, x[4 * w + 2], x[4 * w + 3]);
    }
  }
}

__device__ inline float warp_max(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

// The same bits in every lane: at each distance both lanes add the same two numbers.
template <class T>
__device__ T warp_sum(T x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

}  // namespace gear::cuda
