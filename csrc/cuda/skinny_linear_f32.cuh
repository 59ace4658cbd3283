// skinny_linear in fp32: exact products, one rounding per term, on the CUDA cores.
//
// A warp owns kOutputs rows of the weight (or half as many of weight and gate each) for up to kTokens rows of x. Its
// lanes cut k into pieces of 4: lane l sums the pieces l, l + 32, … in ascending order, and the lanes are added in a
// fixed tree. x passes through shared memory in chunks, two deep; weights come straight from global memory, as only one
// warp of the block reads them; the first 4 KB of each row are asked for, into L2, before the kernel waits for the one
// that writes x. The norm was applied before, by normalise_kernel.
#pragma once

#include "cuda/skinny_linear.cuh"

namespace gear::cuda::skinny::f32 {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kPiece = 4;
constexpr int kSteps = 2;                     // pieces per lane and chunk
constexpr int kWidth = 32 * kPiece * kSteps;  // values of k per chunk
constexpr int kPieces = kWidth / kPiece;

struct alignas(16) Piece {
  float value[kPiece];
};

template <int kTokens>
constexpr int shared_bytes = 2 * kTokens * kWidth * 4;

// Four values of a row from k on; zeros past its end, or if there is no row.
__device__ inline Piece load_piece(const Problem& p, const float* row, int k) {
  Piece piece{};
  if (row == nullptr || k >= p.in_features) return piece;
  if (p.aligned) return *reinterpret_cast<const Piece*>(row + k);
  for (int i = 0; i < kPiece; ++i)
    if (k + i < p.in_features) piece.value[i] = row[k + i];
  return piece;
}

template <int kTokens>
__device__ inline void stage_x(const Problem& p, Piece* rows, int chunk, int first_row) {
  for (int i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
    const int row = first_row + i / kPieces, k = chunk * kWidth + i % kPieces * kPiece;
    const float* x = static_cast<const float*>(p.x) + static_cast<std::int64_t>(row) * p.in_features;
    const bool present = row < p.rows && k < p.in_features;
    if (p.aligned) {
      copy_async<16>(rows + i, present ? x + k : static_cast<const float*>(p.x), present ? 16 : 0);
    } else {
      rows[i] = load_piece(p, row < p.rows ? x : nullptr, k);
    }
  }
}

// One distance of add_lanes: a pair of lanes shares the values that it has left, half each.
template <int kStep, int kCount>
__device__ __forceinline__ void add_pairs(float (&values)[kCount], int lane, int& first) {
  constexpr int kDistance = 16 >> kStep, kHalf = (kCount >> kStep) / 2;
  const bool upper = (lane & kDistance) != 0;
  if constexpr (kHalf == 0) values[0] += __shfl_xor_sync(0xffffffffu, values[0], kDistance);
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float mine = upper ? values[i + kHalf] : values[i], theirs = upper ? values[i] : values[i + kHalf];
    values[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, kDistance);
  }
  first += upper ? kHalf : 0;
  if constexpr (kStep < 4) add_pairs<kStep + 1>(values, lane, first);
}

// Adds each value over the warp, in the tree of distances 16, 8, 4, 2, 1. results: [kCount] in shared memory.
template <int kCount>
__device__ __forceinline__ void add_lanes(float (&values)[kCount], float* results) {
  const int lane = threadIdx.x % 32;
  int first = 0;  // of the values that this lane has left
  add_pairs<0>(values, lane, first);
  // Below 32 values, several lanes have the same one.
  if (kCount < 32 && lane % (32 / (kCount < 32 ? kCount : 32)) != 0) return;
#pragma unroll
  for (int i = 0; i < (kCount < 32 ? 1 : kCount / 32); ++i) results[first + i] = values[i];
}

template <int kTokens, int kOutputs, bool kGate>
__global__ void __launch_bounds__(kThreads) kernel(Problem p) {
  constexpr int kFinal = kGate ? kOutputs / 2 : kOutputs;  // outputs of a warp
  __shared__ float results[kWarps][kOutputs * kTokens];
  Piece* memory = dynamic_shared<Piece>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_output = (static_cast<int>(blockIdx.x) * kWarps + warp) * kFinal;
  const int first_row = static_cast<int>(blockIdx.y) * kTokens;
  const int chunks = (p.in_features + kWidth - 1) / kWidth;
  const auto stage = [&](int chunk) { return memory + chunk % 2 * (kTokens * kPieces); };

  // Weight rows first, gate rows behind them.
  const float* matrix[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int output = first_output + o % kFinal;
    const float* from = static_cast<const float*>(o < kFinal ? p.weight : p.gate);
    matrix[o] = output < p.out_features ? from + static_cast<std::int64_t>(output) * p.in_features : nullptr;
  }
  // The start of each row, a line of 128 bytes per lane, while the kernel before this one may still be running.
#pragma unroll
  for (int o = 0; o < kOutputs; ++o)
    if (matrix[o] != nullptr && lane * 32 < p.in_features) prefetch_l2(matrix[o] + lane * 32);
  dependency_launch();
  dependency_wait();

  // Phase 1: the products.
  float sums[kOutputs * kTokens] = {};  // [output][token]
  stage_x<kTokens>(p, stage(0), 0, first_row);
  copy_async_commit();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) stage_x<kTokens>(p, stage(chunk + 1), chunk + 1, first_row);
    copy_async_commit();
    Piece weights[kSteps][kOutputs];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
        weights[step][o] = load_piece(p, matrix[o], chunk * kWidth + (step * 32 + lane) * kPiece);
    copy_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        const Piece x = stage(chunk)[token * kPieces + step * 32 + lane];
#pragma unroll
        for (int o = 0; o < kOutputs; ++o)
#pragma unroll
          for (int i = 0; i < kPiece; ++i)
            sums[o * kTokens + token] = fmaf(weights[step][o].value[i], x.value[i], sums[o * kTokens + token]);
      }
    __syncthreads();  // before the next round overwrites this chunk
  }

  copy_async_wait<0>();

  // Phase 2: the lanes' sums meet; a lane writes every 32nd result.
  add_lanes(sums, results[warp]);
  __syncwarp();
  for (int i = lane; i < kTokens * kFinal; i += 32) {
    const int row = first_row + i / kFinal, o = i % kFinal;
    if (row >= p.rows || first_output + o >= p.out_features) continue;
    const float* found = results[warp] + o * kTokens + i / kFinal;
    finish<float, kGate>(p, row, first_output + o, found[0], kGate ? found[kFinal * kTokens] : 0.0f);
  }
}

}  // namespace gear::cuda::skinny::f32
