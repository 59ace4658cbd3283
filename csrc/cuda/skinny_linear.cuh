// What the kernels of skinny_linear share: the problem, the order of the sums, staging, the norm and the epilogue.
//
// The reduction dimension is cut into chunks of 64, and the chunks into up to 8 segments. A segment is summed by one
// warp, chunk by chunk in ascending order; the segments' sums are added in ascending order. Both cuts depend on
// in_features alone, so every kernel gives a row the same bits, however many rows there are.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/narrow_floats.h"
#include "cuda/platform.cuh"

namespace gear::cuda::skinny {

constexpr int kChunk = 64;  // values of k that are staged at a time: 128 bytes of 2-byte weights
constexpr int kUnit = 8;    // of which a 16-byte copy holds this many
constexpr int kMostSegments = 8;

struct Problem {
  const void *x, *norm_weight, *weight, *gate, *residual;
  void* y;
  int rows, in_features, out_features;
  float norm_eps;
  bool f32_output;
  bool aligned;  // rows start at multiples of 16 bytes
};

struct Segments {
  int chunks, count;
  __device__ explicit Segments(int in_features)
      : chunks((in_features + kChunk - 1) / kChunk), count(chunks < kMostSegments ? chunks : kMostSegments) {}
  __device__ int begin(int segment) const { return segment * chunks / count; }  // no segment is empty
};

// A staged row of 64 values is 8 units of 16 bytes; unit u of row r lies at place u ^ (r % 8), so that the 8 rows of a
// matrix that ldmatrix reads fall into different banks.
template <class T>
__device__ inline T* unit_of(T* rows, int row, int unit) {
  return rows + row * kChunk + ((unit ^ (row & 7)) * kUnit);
}

// Stages one unit; `source` is the whole row, or null for a row of zeros. Ends with copy_async_wait and a barrier.
template <class T>
__device__ inline void stage_unit(const Problem& p, T* rows, int row, int unit, const T* source, int chunk) {
  T* to = unit_of(rows, row, unit);
  const int k = chunk * kChunk + unit * kUnit;
  const bool present = source != nullptr && k < p.in_features;
  if (p.aligned) {
    copy_async<16>(to, present ? source + k : static_cast<const T*>(p.weight), present ? 16 : 0);
  } else {
    for (int i = 0; i < kUnit; ++i) to[i] = present && k + i < p.in_features ? source[k + i] : T{0};
  }
}

__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, bfloat16) {
  const std::uint32_t b[2] = {b0, b1};
  mma_bf16(d, a, b);
}
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, float16) {
  const std::uint32_t b[2] = {b0, b1};
  mma_f16(d, a, b);
}

// 1 / sqrt(mean(x^2) + eps) of one row, by one warp; every lane gets it.
template <class T>
__device__ inline float norm_scale(const Problem& p, const T* x) {
  constexpr int kValues = 16 / sizeof(T);
  struct alignas(16) Values {
    T value[kValues];
  };
  const int lane = threadIdx.x % 32;
  float total = 0.0f;
  for (int k = lane * kValues; k < p.in_features; k += 32 * kValues) {
    Values some;
    if (p.aligned) {
      some = *reinterpret_cast<const Values*>(x + k);
    } else {
      for (int i = 0; i < kValues; ++i) some.value[i] = k + i < p.in_features ? x[k + i] : T{0};
    }
    for (int i = 0; i < kValues; ++i) total = fmaf(to_float(some.value[i]), to_float(some.value[i]), total);
  }
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
  return 1.0f / sqrtf(total / static_cast<float>(p.in_features) + p.norm_eps);
}

// Rounded to the activations' dtype before and after the weight, as the models do.
template <class T>
__device__ inline T normalised(T x, float scale, T weight) {
  return from_float<T>(to_float(from_float<T>(to_float(x) * scale)) * to_float(weight));
}

// Two neighbours in one register.
template <class T>
__device__ inline std::uint32_t normalised_pair(std::uint32_t x, float scale, std::uint32_t weight) {
  const T low = normalised(T{static_cast<std::uint16_t>(x)}, scale, T{static_cast<std::uint16_t>(weight)});
  const T high = normalised(T{static_cast<std::uint16_t>(x >> 16)}, scale, T{static_cast<std::uint16_t>(weight >> 16)});
  return low.bits | static_cast<std::uint32_t>(high.bits) << 16;
}

// SwiGLU, residual, one rounding at the end.
template <class T, bool kGate>
__device__ inline void finish(const Problem& p, int row, int out, float value, float gate) {
  const std::int64_t at = static_cast<std::int64_t>(row) * p.out_features + out;
  if constexpr (kGate) value = value / (1.0f + expf(-value)) * gate;
  if (p.residual != nullptr) value = to_float(static_cast<const T*>(p.residual)[at]) + value;
  if (p.f32_output) {
    static_cast<float*>(p.y)[at] = value;
  } else {
    static_cast<T*>(p.y)[at] = from_float<T>(value);
  }
}

constexpr int kNormThreads = 256;

// y[row] = rmsnorm(x[row]) * norm_weight, a warp per row: for kernels that would otherwise norm a row again and again.
template <class T>
__global__ void __launch_bounds__(kNormThreads) normalise_kernel(Problem p) {
  dependency_launch();
  dependency_wait();
  const int row = static_cast<int>(blockIdx.x) * (kNormThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= p.rows) return;
  const std::int64_t first = static_cast<std::int64_t>(row) * p.in_features;
  const T* x = static_cast<const T*>(p.x) + first;
  const T* weight = static_cast<const T*>(p.norm_weight);
  T* y = static_cast<T*>(p.y) + first;
  const float scale = norm_scale(p, x);
  for (int k = threadIdx.x % 32; k < p.in_features; k += 32) y[k] = normalised(x[k], scale, weight[k]);
}

}  // namespace gear::cuda::skinny
