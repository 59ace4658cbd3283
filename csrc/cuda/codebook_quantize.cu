// codebook_quantize on a GPU: the exact formula of csrc/cpu/codebook_quantize.h, straightforwardly.
//
// State: run under the CPU emulation only (tests/csrc/cuda_emulation.h), not on hardware yet. No tensor cores and no
// register tiling: its purpose is a correct compiled path that a faster one can be compared with.
//
// A block owns kRows rows of z in shared memory. Its threads stride over the codes; each keeps the best (score, index)
// of every row in registers, so nothing of size N x K is stored. A second walk (inner product only) finds the lowest
// code within the rounding of exp() to 1. A reduction over the block picks the winner, and the block copies its vector.
#include "cuda/codebook_quantize.h"

#include <cstdint>

#include "cuda/platform.cuh"

namespace gear::cuda {
namespace {

constexpr int kRows = 8;
constexpr int kThreads = 256;
constexpr int kNone = 0x7fffffff;

struct Candidate {
  float score;  // larger is better
  int code;
};

// A NaN wins, the first of several; equal scores go to the lower code.
__device__ bool better(Candidate a, Candidate b) {
  const bool a_nan = a.score != a.score, b_nan = b.score != b.score;
  if (a_nan || b_nan) return a_nan && (!b_nan || a.code < b.code);
  return a.score > b.score || (a.score == b.score && a.code < b.code);
}

__device__ Candidate best_of_block(Candidate mine, Candidate* shared) {
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
__device__ void products(const float* rows, const float* code, int d, float* dot) {
  const float first = code[0];
#pragma unroll
  for (int r = 0; r < kRows; ++r) dot[r] = __fmul_rn(rows[r * d], first);
  for (int i = 1; i < d; ++i) {
    const float x = code[i];
#pragma unroll
    for (int r = 0; r < kRows; ++r) dot[r] = __fmaf_rn(rows[r * d + i], x, dot[r]);
  }
}

__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const float* z, const float* z2, const float* codebook, const float* e2, int64_t n, int k, int d,
                    bool inner_product, int64_t* indices, float* quantized) {
  float* rows = dynamic_shared<float>();  // [kRows][d]
  __shared__ Candidate candidates[kThreads];
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int used = static_cast<int>(n - first_row < kRows ? n - first_row : kRows);

  // Phase 1: the rows; missing ones are zero.
  for (int i = threadIdx.x; i < kRows * d; i += kThreads) rows[i] = i < used * d ? z[first_row * d + i] : 0.0f;
  float norm[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) norm[r] = !inner_product && r < used ? z2[first_row + r] : 0.0f;
  __syncthreads();

  // Phase 2: the best code of each row among this thread's.
  Candidate best[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) best[r] = {-__int_as_float(0x7f800000), kNone};
  for (int code = threadIdx.x; code < k; code += kThreads) {
    float dot[kRows];
    products(rows, codebook + static_cast<int64_t>(code) * d, d, dot);
    const float code_norm = inner_product ? 0.0f : e2[code];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float distance = __fsub_rn(__fadd_rn(norm[r], code_norm), 2.0f * dot[r]);
      const Candidate found{inner_product ? dot[r] : -distance, code};
      if (better(found, best[r])) best[r] = found;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) best[r] = best_of_block(best[r], candidates);

  // Phase 3, inner product: the lowest code whose exp(score - best) is 1 in fp32.
  if (inner_product) {
    int lowest[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) lowest[r] = best[r].code;
    for (int code = threadIdx.x; code < k; code += kThreads) {
      float dot[kRows];
      products(rows, codebook + static_cast<int64_t>(code) * d, d, dot);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (__fsub_rn(best[r].score, dot[r]) <= 0x1p-25f && code < lowest[r]) lowest[r] = code;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) best[r] = best_of_block({0.0f, lowest[r]}, candidates);
  }

  // Phase 4: write.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= used) break;
    if (threadIdx.x == 0) indices[first_row + r] = best[r].code;
    for (int i = threadIdx.x; i < d; i += kThreads)
      quantized[(first_row + r) * d + i] = codebook[static_cast<int64_t>(best[r].code) * d + i];
  }
}

}  // namespace

void codebook_quantize(const float* z, const float* z2, const float* codebook, const float* e2, int64_t n, int64_t k,
                       int64_t d, int metric, int64_t* indices, float* quantized, void* stream) {
  if (n == 0) return;
  const int64_t blocks = (n + kRows - 1) / kRows;
  const size_t shared = static_cast<size_t>(kRows * d) * sizeof(float);  // 16 KiB at d = 512
  launch("codebook_quantize", {static_cast<unsigned>(blocks), kThreads, shared, stream}, quantize_kernel, z, z2,
         codebook, e2, n, static_cast<int>(k), static_cast<int>(d), metric == 1, indices, quantized);
}

}  // namespace gear::cuda
