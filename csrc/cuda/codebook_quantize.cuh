// What the kernels of codebook_quantize share: the problem and the official choice among codes.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cuda/platform.cuh"

namespace gear::cuda::codebook {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNone = 0x7fffffff;
constexpr float kTie = 0x1p-25f;  // codes this far below the largest product have the softmax's maximum

struct Problem {
  const float *z, *z2, *codebook, *e2;
  std::int64_t n;
  int k, d;
  bool inner_product;
  std::int64_t* indices;
  float* quantized;
};

__device__ inline bool is_finite(float x) { return x - x == 0.0f; }

struct Candidate {
  float score;  // larger is better: minus the distance, or the product
  int code;
};

// A NaN wins, the first of several; equal scores go to the lower code.
__device__ inline bool better(Candidate a, Candidate b) {
  const bool a_nan = a.score != a.score, b_nan = b.score != b.score;
  if (a_nan || b_nan) return a_nan && (!b_nan || a.code < b.code);
  return a.score > b.score || (a.score == b.score && a.code < b.code);
}

__device__ inline float official_score(const Problem& p, float z_norm, float code_norm, float dot) {
  return p.inner_product ? dot : -__fsub_rn(__fadd_rn(z_norm, code_norm), 2.0f * dot);
}

}  // namespace gear::cuda::codebook
