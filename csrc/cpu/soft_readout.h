// Soft read-out of a codebook: softmax over codes of scale (z . e_k + bias_k), times a table. See ops/soft_readout.py.
//
// Codes are walked in blocks of 64; each row keeps a running maximum, sum and accumulator, rescaled when the maximum
// rises, so no N x K array exists. The order of every sum is fixed: results depend on neither threads nor other rows.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gear {

struct SoftReadout {
  const float* z;         // [n, d]
  const float* codebook;  // [k, d]
  const float* bias;      // [k]
  const float* table;     // [k, c]
  int64_t n, k, d, c;
  float scale;
  float* out;  // [n, c]
  float* lse;  // [n]: log of the sum of exponentials; null where it is not wanted
};

namespace soft_readout {
constexpr int kCodes = 64;  // codes per block
constexpr int kRows = 96;   // rows that share a pass over the codebook

inline int64_t blocks(int64_t k) { return (k + kCodes - 1) / kCodes; }
}  // namespace soft_readout

namespace cpu {
// All arrays are contiguous fp32; lse may be null. Throws std::bad_alloc.
void soft_readout(const float* z, const float* codebook, const float* bias, const float* table, int64_t n, int64_t k,
                  int64_t d, int64_t c, float scale, float* out, float* lse);
}  // namespace cpu

namespace soft_readout {
// Transposes matrix [k, width] into panels [blocks][width][kCodes]; columns past k are left as they are.
void transpose(const float* matrix, int64_t k, int64_t width, float* panels);
}  // namespace soft_readout

}  // namespace gear

// Rows [first, last), at most kRows; panels is the transposed codebook, zero-padded.
GEAR_DECLARE_ISA(void, soft_readout_rows,
                 (const gear::SoftReadout& call, const float* panels, int64_t first, int64_t last))
