// skinny_linear for more than 16 rows of bf16 or fp16: bound by the traffic between L2 and the SMs.
//
// A block owns 64 outputs (with a gate: 32 and their gates) of up to kTokens rows; 4 warps, 2 by 2, own half of the
// outputs and every second group of 8 rows each. All of them walk the whole reduction, segment by segment, through
// stages that the block shares. The norm was applied before, by normalise_kernel.
#pragma once

#include "cuda/skinny_linear.cuh"

namespace gear::cuda::skinny::wide {

constexpr int kThreads = 128;
constexpr int kTiles = 2;    // of 16 matrix rows, per warp
constexpr int kMatrix = 64;  // rows of the weight (and gate) per block
constexpr int kStages = 4;
constexpr int kColumns = kMatrix + 4;  // of the result in shared memory, padded

template <int kTokens>
constexpr int stage_values = (kMatrix + kTokens) * kChunk;
template <int kTokens>
constexpr int shared_bytes = kStages * stage_values<kTokens> * 2;

template <bool kGate>
constexpr int outputs = kGate ? kMatrix / 2 : kMatrix;

// The block's matrix row -> (output of the block, of the gate). With a gate, a warp's second tile holds its first's.
struct MatrixRow {
  int output;
  bool gate;
};
template <bool kGate>
__device__ inline MatrixRow matrix_row(int row) {
  if constexpr (!kGate) return {row, false};
  return {row / 32 * 16 + row % 16, row / 16 % 2 == 1};
}

template <class T, bool kGate>
__device__ inline void stage_weights(const Problem& p, T* rows, int chunk, int first_output) {
  for (int i = threadIdx.x; i < kMatrix * 8; i += kThreads) {
    const MatrixRow at = matrix_row<kGate>(i / 8);
    const int output = first_output + at.output;
    const T* matrix = static_cast<const T*>(at.gate ? p.gate : p.weight);
    stage_unit(p, rows, i / 8, i % 8,
               output < p.out_features ? matrix + static_cast<std::int64_t>(output) * p.in_features : nullptr, chunk);
  }
}

template <class T>
__device__ inline void stage_x(const Problem& p, T* rows, int chunk, int first_row, int groups) {
  for (int i = threadIdx.x; i < groups * 64; i += kThreads) {
    const int row = first_row + i / 8;
    const T* x = static_cast<const T*>(p.x) + static_cast<std::int64_t>(row) * p.in_features;
    stage_unit(p, rows, kMatrix + i / 8, i % 8, row < p.rows ? x : nullptr, chunk);
  }
}

// sums[tile][i] += the chunk's products for row groups 2 i + the warp's column.
template <class T, int kGroups>
__device__ inline void multiply(T* rows, int groups, float (&sums)[kTiles][kGroups][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_matrix = warp / 2 * kTiles * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 32 values of k
    std::uint32_t weights[kTiles][2][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int step = 0; step < 2; ++step)
        load_matrix_x4(weights[tile][step],
                       unit_of(rows, first_matrix + tile * 16 + lane % 16, half * 4 + step * 2 + lane / 16));
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = 2 * i + warp % 2;
      if (group >= groups) break;
      std::uint32_t x[4];
      load_matrix_x4(x, unit_of(rows, kMatrix + group * 8 + lane % 8, half * 4 + lane / 8));
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          mma(sums[tile][i], weights[tile][step], x[step * 2], x[step * 2 + 1], T{});
    }
  }
}

// total += sums (or = sums, at the first segment); sums = 0.
template <int kGroups>
__device__ inline void end_segment(bool first, float (&sums)[kTiles][kGroups][4], float (&total)[kTiles][kGroups][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        total[tile][i][j] = first ? sums[tile][i][j] : total[tile][i][j] + sums[tile][i][j];
        sums[tile][i][j] = 0.0f;
      }
}

template <class T, int kTokens, bool kGate>
__global__ void __launch_bounds__(kThreads) kernel(Problem p) {
  constexpr int kGroups = kTokens / 16;  // per warp
  T* memory = dynamic_shared<T>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_output = static_cast<int>(blockIdx.x) * outputs<kGate>;
  const int first_row = static_cast<int>(blockIdx.y) * kTokens;
  const int used = p.rows - first_row < kTokens ? p.rows - first_row : kTokens, groups = (used + 7) / 8;
  const Segments segments(p.in_features);
  const auto stage = [&](int chunk) { return memory + chunk % kStages * stage_values<kTokens>; };

  // Phase 1: the weights of the first stages, while the kernel before this one may still be running; then x.
  for (int chunk = 0; chunk < kStages - 1 && chunk < segments.chunks; ++chunk)
    stage_weights<T, kGate>(p, stage(chunk), chunk, first_output);
  dependency_launch();
  dependency_wait();
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    if (chunk < segments.chunks) stage_x(p, stage(chunk), chunk, first_row, groups);
    copy_async_commit();
  }

  // Phase 2: the products.
  float sums[kTiles][kGroups][4] = {}, total[kTiles][kGroups][4] = {};
  int segment = 0;
  for (int chunk = 0; chunk < segments.chunks; ++chunk) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the chunk has landed for all, and all have left the one before it
    const int next = chunk + kStages - 1;
    if (next < segments.chunks) {
      stage_weights<T, kGate>(p, stage(next), next, first_output);
      stage_x(p, stage(next), next, first_row, groups);
    }
    copy_async_commit();
    multiply<T, kGroups>(stage(chunk), groups, sums);
    if (chunk + 1 == segments.begin(segment + 1)) end_segment(segment++ == 0, sums, total);
  }

  // Phase 3: through shared memory, so that neighbouring threads write neighbouring outputs.
  copy_async_wait<0>();
  __syncthreads();
  float* result = reinterpret_cast<float*>(memory);  // [kTokens][kColumns]
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = (warp / 2 * kTiles + tile) * 16 + lane / 4 + j / 2 * 8;
        const int token = (2 * i + warp % 2) * 8 + lane % 4 * 2 + j % 2;
        result[token * kColumns + column] = total[tile][i][j];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < used * outputs<kGate>; i += kThreads) {
    const int output = i % outputs<kGate>, token = i / outputs<kGate>;
    if (first_output + output >= p.out_features) continue;
    const float* row = result + token * kColumns + (kGate ? output / 16 * 32 + output % 16 : output);
    finish<T, kGate>(p, first_row + token, first_output + output, row[0], kGate ? row[16] : 0.0f);
  }
}

}  // namespace gear::cuda::skinny::wide
