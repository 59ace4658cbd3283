// Gradients of the soft read-out (forward is soft_readout with lse). See ops/dual_readout.py.
//
//   P = exp(scale (z . e + bias) - lse)      dS = scale P (G . table^T - delta)
//   dz = dS e      de = dS^T z, without the part that flows through bias      dbias = colsum(dS)      dtable = P^T G
//
// Rows are taken in chunks. Phase 1, parallel over blocks of codes: P and dS are computed again; a block adds its rows
// of de, dbias and dtable, and leaves dS in a scratch of [chunk, K]. Phase 2, parallel over blocks of rows: dz from
// that scratch. Every sum runs in ascending order of rows or codes, so results do not depend on threads.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gear {

struct DualReadoutBackward {
  const float* grad;      // [n, c]
  const float* delta;     // [n]
  const float* lse;       // [n]
  const float* z;         // [n, d]
  const float* codebook;  // [k, d]
  const float* bias;      // [k]
  int64_t n, k, d, c;
  float scale;
  float* dz;         // [n, d], or null
  float* dcodebook;  // [k, d], zeros at first, or null
  float* dbias;      // [k], zeros at first; goes with dcodebook
  float* dtable;     // [k, c], zeros at first, or null
};

namespace dual_readout {
constexpr int kRows = 96;       // rows that share a block of codes in L2
constexpr int kChunk = 4 * 96;  // rows per chunk
}  // namespace dual_readout

namespace cpu {
// All arrays are contiguous fp32; gradients that are not wanted are null. Throws std::bad_alloc.
void dual_readout_backward(const float* grad, const float* delta, const float* lse, const float* z,
                           const float* codebook, const float* bias, const float* table, int64_t n, int64_t k,
                           int64_t d, int64_t c, float scale, float* dz, float* dcodebook, float* dbias, float* dtable);
}  // namespace cpu

}  // namespace gear

// Phase 1 for codes [64 block, 64 block + 64) and rows [first, last). code_panel [d][64], table_panel [c][64]: the
// block's rows transposed, zero-padded; scratch [last - first][64], written if dz is wanted.
GEAR_DECLARE_ISA(void, dual_readout_codes,
                 (const gear::DualReadoutBackward& call, const float* code_panel, const float* table_panel,
                  int64_t block, int64_t first, int64_t last, float* scratch))
// Phase 2 for rows [first, last) of a chunk that begins at row `chunk`; scratch [blocks][rows of the chunk][64].
GEAR_DECLARE_ISA(void, dual_readout_rows,
                 (const gear::DualReadoutBackward& call, const float* scratch, int64_t chunk, int64_t chunk_rows,
                  int64_t first, int64_t last))
