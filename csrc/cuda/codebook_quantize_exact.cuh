// codebook_quantize by the official formula for every code: for widths that have no faster kernel, and for the rows
// that the proposals left open.
//
// A block owns kRows rows of z in shared memory. Its threads stride over the codes; each keeps the best (score, index)
// of every row in registers, so nothing of size N x K is stored. A second walk (inner product only) finds the lowest
// code within the rounding of exp() to 1. A reduction over the block picks the winner, and the block copies its vector.
#pragma once

#include "cuda/codebook_quantize.cuh"

namespace gear::cuda::codebook::exact {

constexpr int kRows = 8;
constexpr int kThreads = 256;

__device__ inline Candidate best_of_block(Candidate mine, Candidate* shared) {
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half && better(shared[threadIdx.x + half], shared[threadIdx.x]))
      shared[threadIdx.x] = shared[threadIdx.x + half];
    __syncthreads();
  }
  const Candidate result = shared[0];
  __syncthreads();
  return result;
}

// dot[r] = z_r . e in ascending order, one rounding per term. rows: [kRows][d] in shared memory.
__device__ inline void products(const float* rows, const float* code, int d, float* dot) {
  const float first = code[0];
#pragma unroll
  for (int r = 0; r < kRows; ++r) dot[r] = __fmul_rn(rows[r * d], first);
  for (int i = 1; i < d; ++i) {
    const float x = code[i];
#pragma unroll
    for (int r = 0; r < kRows; ++r) dot[r] = __fmaf_rn(rows[r * d + i], x, dot[r]);
  }
}

// The official code of each of the rows in shared memory; every thread gets them.
__device__ inline void decide(const Problem& p, const float* rows, const float* norm, Candidate* shared,
                              Candidate* best) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) best[r] = {-bits_float(0x7f800000), kNone};
  for (int code = threadIdx.x; code < p.k; code += kThreads) {
    float dot[kRows];
    products(rows, p.codebook + static_cast<std::int64_t>(code) * p.d, p.d, dot);
    const float code_norm = p.inner_product ? 0.0f : p.e2[code];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Candidate found{official_score(p, norm[r], code_norm, dot[r]), code};
      if (better(found, best[r])) best[r] = found;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) best[r] = best_of_block(best[r], shared);
  if (!p.inner_product) return;

  // The lowest code whose exp(score - best) is 1 in fp32. A largest product that is not finite makes every p of the
  // softmax NaN, of which argmax takes the first.
  int lowest[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) lowest[r] = is_finite(best[r].score) ? best[r].code : 0;
  for (int code = threadIdx.x; code < p.k; code += kThreads) {
    float dot[kRows];
    products(rows, p.codebook + static_cast<std::int64_t>(code) * p.d, p.d, dot);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (__fsub_rn(best[r].score, dot[r]) <= kTie && code < lowest[r]) lowest[r] = code;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) best[r] = best_of_block({0.0f, lowest[r]}, shared);
}

// `list` and `count`: the rows to decide, or null for all of them.
__global__ void __launch_bounds__(kThreads) kernel(Problem p, const std::int64_t* list, const int* count) {
  float* rows = dynamic_shared<float>();  // [kRows][d]
  __shared__ Candidate shared[kThreads];
  const std::int64_t total = list == nullptr ? p.n : *count;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kRows; first < total;
       first += static_cast<std::int64_t>(gridDim.x) * kRows) {
    const int used = static_cast<int>(total - first < kRows ? total - first : kRows);
    const auto row_of = [&](int r) { return list == nullptr ? first + r : list[first + r]; };

    // Phase 1: the rows; missing ones are zero.
    for (int i = threadIdx.x; i < kRows * p.d; i += kThreads)
      rows[i] = i / p.d < used ? p.z[row_of(i / p.d) * p.d + i % p.d] : 0.0f;
    float norm[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) norm[r] = !p.inner_product && r < used ? p.z2[row_of(r)] : 0.0f;
    __syncthreads();

    // Phase 2: decide. Phase 3: write.
    Candidate best[kRows];
    decide(p, rows, norm, shared, best);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= used) break;
      const std::int64_t row = row_of(r);
      if (threadIdx.x == 0) p.indices[row] = best[r].code;
      for (int i = threadIdx.x; i < p.d; i += kThreads)
        p.quantized[row * p.d + i] = p.codebook[static_cast<std::int64_t>(best[r].code) * p.d + i];
    }
  }
}

}  // namespace gear::cuda::codebook::exact
