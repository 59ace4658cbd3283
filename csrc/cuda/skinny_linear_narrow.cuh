// skinny_linear for up to 16 rows of bf16 or fp16: bound by the weights' bytes.
//
// A block owns 16 outputs; its 8 warps are the 8 segments of the reduction. Each warp streams its part of the weights
// (and of x) through stages of its own with cp.async, so the main loop has no block barrier. Weights are the tensor
// core's 16-row operand, rows of x its 8-wide one. All stages' weights are asked for before the kernel waits for the
// one that writes x; at in_features <= 512 per stage that is all that the block will read.
#pragma once

#include "cuda/skinny_linear.cuh"

namespace gear::cuda::skinny::narrow {

constexpr int kWarps = kMostSegments;
constexpr int kThreads = 32 * kWarps;
constexpr int kOutputs = 16;  // per block
constexpr int kTokens = 16;   // rows of x per block
constexpr int kGroups = kTokens / 8;
constexpr int kBeside = 2048;  // bytes of an SM that a block takes beside its stages: static, and CUDA's own 1024

constexpr int blocks_of_sm(int sm_bytes, int stage_bytes, int stages) {
  return sm_bytes / (stages * stage_bytes + kBeside);
}

// 2 stages or 3: what keeps more of them on their way per SM, blocks times stages; 3 where that is equal. The order of
// the sums does not follow it. Arithmetic, not a measurement: nobody has timed either on hardware.
constexpr int stages_for(int block_bytes, int sm_bytes, int stage_bytes) {
  if (3 * stage_bytes + kBeside / 2 > block_bytes) return 2;
  return 3 * blocks_of_sm(sm_bytes, stage_bytes, 3) < 2 * blocks_of_sm(sm_bytes, stage_bytes, 2) ? 2 : 3;
}

template <bool kNorm, bool kGate>
struct Layout {  // of a stage, in rows of kChunk values
  static constexpr int tiles = kGate ? 2 : 1;
  static constexpr int x = 16 * tiles;  // weight, gate, then x, then the norm's weight
  static constexpr int norm = x + kTokens;
  static constexpr int rows = norm + (kNorm ? 1 : 0);
  static constexpr int warp_bytes = rows * kChunk * 2;
  static constexpr int stage_bytes = kWarps * warp_bytes;
};

// 227 KiB per block and 228 per SM (sm_90, sm_100); 163 and 164 (sm_80); 99 and 100 (sm_86, sm_89, sm_120).
template <bool kNorm, bool kGate>
constexpr bool stages_are(int at_228, int at_164, int at_100) {
  constexpr int kStage = Layout<kNorm, kGate>::stage_bytes;
  return stages_for(227 << 10, 228 << 10, kStage) == at_228 && stages_for(163 << 10, 164 << 10, kStage) == at_164 &&
         stages_for(99 << 10, 100 << 10, kStage) == at_100;
}
// SwiGLU: two blocks per SM of sm_90. Without a gate: two of sm_90 and of sm_80.
static_assert(stages_are<true, true>(2, 3, 2) && stages_are<false, true>(2, 3, 2));
static_assert(stages_are<true, false>(3, 2, 2) && stages_are<false, false>(3, 2, 3));
static_assert(blocks_of_sm(228 << 10, Layout<true, true>::stage_bytes, 2) == 2);
static_assert(blocks_of_sm(100 << 10, Layout<true, true>::stage_bytes, 2) == 1, "two stages fit every GPU");

template <class T, bool kNorm, bool kGate>
class Warp {
  using At = Layout<kNorm, kGate>;

 public:
  __device__ Warp(const Problem& p, T* memory, int stages)
      : p_(p), segments_(p.in_features), memory_(memory), stages_(stages), lane_(threadIdx.x % 32) {
    const int segment = threadIdx.x / 32;
    if (segment >= segments_.count) return;
    first_ = segments_.begin(segment);
    chunks_ = segments_.begin(segment + 1) - first_;
  }

  __device__ int chunks() const { return chunks_; }

  __device__ void stage_weights(int chunk, int first_output) {
    if (chunk >= chunks_) return;
    T* rows = stage(chunk);
    for (int i = lane_; i < At::x * 8; i += 32) {
      const int row = i / 8, output = first_output + row % 16;
      const T* matrix = static_cast<const T*>(row < 16 ? p_.weight : p_.gate);
      const bool present = output < p_.out_features;
      stage_unit(p_, rows, row, i % 8, present ? matrix + static_cast<std::int64_t>(output) * p_.in_features : nullptr,
                 first_ + chunk);
    }
    if constexpr (kNorm)
      if (lane_ < 8) stage_unit(p_, rows, At::norm, lane_, static_cast<const T*>(p_.norm_weight), first_ + chunk);
  }

  __device__ void stage_x(int chunk, int first_row, int groups) {
    if (chunk >= chunks_) return;
    for (int i = lane_; i < groups * 64; i += 32) {
      const int row = first_row + i / 8;
      const T* x = static_cast<const T*>(p_.x) + static_cast<std::int64_t>(row) * p_.in_features;
      stage_unit(p_, stage(chunk), At::x + i / 8, i % 8, row < p_.rows ? x : nullptr, first_ + chunk);
    }
  }

  // sums[tile][group] += the chunk's products; `scale`: of this lane's row in each group.
  __device__ void multiply(int chunk, int groups, const float (&scale)[kGroups],
                           float (&sums)[At::tiles][kGroups][4]) const {
    T* rows = stage(chunk);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 values of k
      std::uint32_t x[kGroups][4];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (group >= groups) break;
        load_matrix_x4(x[group], unit_of(rows, At::x + group * 8 + lane_ % 8, half * 4 + lane_ / 8));
        if constexpr (kNorm) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const T* weight = unit_of(rows, At::norm, half * 4 + i) + lane_ % 4 * 2;
            x[group][i] =
                normalised_pair<T>(x[group][i], scale[group], *reinterpret_cast<const std::uint32_t*>(weight));
          }
        }
      }
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int tile = 0; tile < At::tiles; ++tile) {
          std::uint32_t weights[4];
          load_matrix_x4(weights, unit_of(rows, tile * 16 + lane_ % 16, half * 4 + step * 2 + lane_ / 16));
#pragma unroll
          for (int group = 0; group < kGroups; ++group)
            if (group < groups) mma(sums[tile][group], weights, x[group][step * 2], x[group][step * 2 + 1], T{});
        }
    }
  }

 private:
  __device__ T* stage(int chunk) const { return memory_ + chunk % stages_ * (At::rows * kChunk); }

  const Problem& p_;
  const Segments segments_;
  T* const memory_;
  const int stages_, lane_;
  int first_ = 0, chunks_ = 0;  // of this warp's segment
};

// Waits until at most `stages - 1` of the thread's groups of copies are pending.
__device__ inline void wait_for_oldest(int stages) {
  if (stages == 3) {
    copy_async_wait<2>();
  } else {
    copy_async_wait<1>();
  }
}

// Adds the segments' sums in order and writes. partial: [segment][16 tiles][kTokens]
template <class T, bool kGate>
__device__ inline void reduce(const Problem& p, const float* partial, int first_output, int first_row) {
  constexpr int kPlane = (kGate ? 2 : 1) * kOutputs * kTokens;
  const int segments = Segments(p.in_features).count;
  for (int i = threadIdx.x; i < kOutputs * kTokens; i += kThreads) {
    const int output = i % kOutputs, token = i / kOutputs;
    if (first_output + output >= p.out_features || first_row + token >= p.rows) continue;
    const float* at = partial + output * kTokens + token;
    float value = at[0], gate = kGate ? at[kOutputs * kTokens] : 0.0f;
    for (int segment = 1; segment < segments; ++segment) {
      value += at[segment * kPlane];
      if constexpr (kGate) gate += at[segment * kPlane + kOutputs * kTokens];
    }
    finish<T, kGate>(p, first_row + token, first_output + output, value, gate);
  }
}

template <class T, bool kNorm, bool kGate>
__global__ void __launch_bounds__(kThreads, 2) kernel(Problem p, int stages) {
  using At = Layout<kNorm, kGate>;
  __shared__ float scales[kTokens];
  T* memory = dynamic_shared<T>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_output = static_cast<int>(blockIdx.x) * kOutputs, first_row = static_cast<int>(blockIdx.y) * kTokens;
  const int used = p.rows - first_row < kTokens ? p.rows - first_row : kTokens, groups = (used + 7) / 8;
  Warp<T, kNorm, kGate> work(p, memory + warp * stages * (At::rows * kChunk), stages);

  // Phase 1: the weights of the first stages, while the kernel before this one may still be running.
  for (int chunk = 0; chunk < stages; ++chunk) work.stage_weights(chunk, first_output);
  dependency_launch();
  dependency_wait();

  // Phase 2: x, and the norm of its rows.
  for (int chunk = 0; chunk < stages; ++chunk) {
    work.stage_x(chunk, first_row, groups);
    copy_async_commit();
  }
  float scale[kGroups] = {};
  if constexpr (kNorm) {
    for (int token = warp; token < kTokens; token += kWarps) {
      const T* x = static_cast<const T*>(p.x) + static_cast<std::int64_t>(first_row + token) * p.in_features;
      const float found = token < used ? norm_scale(p, x) : 0.0f;  // the same branch for the whole warp
      if (lane == 0) scales[token] = found;
    }
    __syncthreads();
    for (int group = 0; group < kGroups; ++group) scale[group] = scales[group * 8 + lane / 4];
  }

  // Phase 3: the products of this warp's segment.
  float sums[At::tiles][kGroups][4] = {};
  for (int chunk = 0; chunk < work.chunks(); ++chunk) {
    wait_for_oldest(stages);
    __syncwarp();
    work.multiply(chunk, groups, scale, sums);
    __syncwarp();
    work.stage_weights(chunk + stages, first_output);
    work.stage_x(chunk + stages, first_row, groups);
    copy_async_commit();
  }

  // Phase 4: the segments' sums meet in shared memory.
  copy_async_wait<0>();
  __syncthreads();
  float* partial = reinterpret_cast<float*>(memory);  // [segment][tile][16][kTokens]
#pragma unroll
  for (int tile = 0; tile < At::tiles; ++tile)
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = tile * kOutputs + lane / 4 + i / 2 * 8, token = group * 8 + lane % 4 * 2 + i % 2;
        partial[(warp * At::tiles * kOutputs + output) * kTokens + token] = sums[tile][group][i];
      }
  __syncthreads();
  reduce<T, kGate>(p, partial, first_output, first_row);
}

}  // namespace gear::cuda::skinny::narrow
