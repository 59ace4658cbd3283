// The two phases of dual_readout's backward pass, compiled once per instruction set. See dual_readout.h.
#include "cpu/dual_readout.h"

#include "cpu/block_product.h"
#include "cpu/soft_readout.h"

namespace gear::GEAR_ISA {
namespace {

using gear::dual_readout::kRows;
using gear::soft_readout::kCodes;
static_assert(kCodes % kLanes == 0, "blocks hold whole vectors");

// z . e -> P = exp(scale (z . e + bias) - lse), 0 past the last code.
void probabilities(const DualReadoutBackward& call, const float* bias, float lse, int used, float* scores) {
  for (int code = 0; code < used; ++code) scores[code] = call.scale * (scores[code] + bias[code]) - lse;
  for (int code = used; code < kCodes; ++code) scores[code] = -__builtin_inff();
  for (int i = 0; i < kCodes; i += kLanes) store(scores + i, exp(load(scores + i)));
}

// G . table^T -> dS.
void score_gradients(const DualReadoutBackward& call, const float* weights, float delta, float* d_scores) {
  const Vec scale = splat(call.scale), shift = splat(delta);
  for (int i = 0; i < kCodes; i += kLanes)
    store(d_scores + i, mul(mul(scale, load(weights + i)), sub(load(d_scores + i), shift)));
}

}  // namespace

void dual_readout_codes(const DualReadoutBackward& call, const float* code_panel, const float* table_panel,
                        int64_t block, int64_t first, int64_t last, float* scratch) {
  const int64_t d = call.d, c = call.c, code = block * kCodes;
  const int used = static_cast<int>(call.k - code < kCodes ? call.k - code : kCodes);
  float weights[kRows * kCodes], own_scores[kRows * kCodes];
  for (int64_t begin = first; begin < last; begin += kRows) {
    const int64_t rows = last - begin < kRows ? last - begin : kRows;
    const float *z = call.z + begin * d, *grad = call.grad + begin * c;
    float* d_scores = call.dz != nullptr ? scratch + (begin - first) * kCodes : own_scores;

    // P
    block_product(rows, d, kCodes, {z, d, 1}, code_panel, kCodes, false, weights, kCodes);
    for (int64_t r = 0; r < rows; ++r)
      probabilities(call, call.bias + code, call.lse[begin + r], used, weights + r * kCodes);

    // dtable
    if (call.dtable != nullptr)
      block_product(used, rows, c, {weights, 1, kCodes}, grad, c, true, call.dtable + code * c, c);
    if (call.dz == nullptr && call.dcodebook == nullptr) continue;

    // dS
    block_product(rows, c, kCodes, {grad, c, 1}, table_panel, kCodes, false, d_scores, kCodes);
    for (int64_t r = 0; r < rows; ++r)
      score_gradients(call, weights + r * kCodes, call.delta[begin + r], d_scores + r * kCodes);

    // de, dbias
    if (call.dcodebook == nullptr) continue;
    block_product(used, rows, d, {d_scores, 1, kCodes}, z, d, true, call.dcodebook + code * d, d);
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < used; ++i) call.dbias[code + i] += d_scores[r * kCodes + i];
  }
}

void dual_readout_rows(const DualReadoutBackward& call, const float* scratch, int64_t chunk, int64_t chunk_rows,
                       int64_t first, int64_t last) {
  const int64_t d = call.d;
  for (int64_t code = 0; code < call.k; code += kCodes) {
    const int64_t used = call.k - code < kCodes ? call.k - code : kCodes;
    const float* d_scores = scratch + code * chunk_rows + (first - chunk) * kCodes;
    block_product(last - first, used, d, {d_scores, kCodes, 1}, call.codebook + code * d, d, code > 0,
                  call.dz + first * d, d);
  }
}

}  // namespace gear::GEAR_ISA
