// codebook_quantize: the official index of the nearest code, without the N x K array.
//
// Score of code k for vector z, in fp32, every operation rounded once:
//
//     dot_k = fma(z_{d-1}, e_{k,d-1}, ... fma(z_1, e_{k,1}, z_0 e_{k,0}))          ascending, one rounding per term
//     l2:            D_k = (|z|^2 + |e_k|^2) - 2 dot_k      index = lowest k with the smallest D_k
//     inner product: index = lowest k with exp(dot_k - max_j dot_j) = 1 in fp32, that is max - dot_k <= 2^-25
//
// |z|^2 and |e|^2 are given. The dot product's order is that of the BLAS below the official implementation.
//
// Two passes per block of rows. The first computes an approximate score for all codes in registers and keeps, per row,
// the maximum of each (group of kGroup codes, lane): K / lanes numbers of thread-local scratch. The second evaluates
// the formula above for the codes of every (group, lane) whose maximum lies within the two computations' joint error
// bound of the row's best; usually that is one. Rows for which there is no finite bound are evaluated in full.
//
// With AMX the first pass runs in bf16 on tile registers (codebook_quantize_tiles.cpp), with its own, wider bound. A
// block of rows that it leaves too far open, or without a finite bound, takes the fp32 passes; the index is the same.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gear {

enum class Metric : int { l2 = 0, inner_product = 1 };

// Codes in the order of the first pass: panels of `width` codes, each [d][width], then a bias per code.
struct PackedCodebook {
  const float* panels;  // [padded_k / width][d][width]
  const float* bias;    // [padded_k]: -|e|^2 / 2 (l2) or 0 (inner product); -inf for padding
  int64_t padded_k;     // K rounded up to a multiple of kGroup
  double max_norm2;     // largest |e|^2
};

// Codes as rows of bf16 slots for the tile registers; see codebook_quantize_tiles.cpp.
struct TiledCodebook {
  const uint16_t* slots;               // [granules * kGranule][n_slots]
  int64_t n_slots;                     // a multiple of kStepSlots
  int64_t granules;                    // even
  float max_whole, max_low, max_rest;  // largest |e|^2, |e - hi|^2 and |e - hi - lo|^2
};

struct QuantizeProblem {
  const float* z;         // [n, d]
  const float* z2;        // [n]: |z|^2 as the official code rounds it (l2 only)
  const float* codebook;  // [k, d]
  const float* e2;        // [k]: |e|^2 likewise (l2 only)
  int64_t n, k, d;
  Metric metric;
  int64_t* indices;  // [n]
  float* quantized;  // [n, d]
};

namespace codebook_quantize {
constexpr int64_t kGroup = 256;     // codes per maximum kept (a multiple of every panel width)
constexpr int64_t kBlockRows = 96;  // rows that share a pass over the codebook

// On tile registers:
constexpr int64_t kGranule = 16;         // codes per maximum kept
constexpr int64_t kStepSlots = 32;       // bf16 numbers per row of a tile
constexpr int64_t kMostTileRows = 256;   // rows that share a pass over the codebook, at most; a multiple of 32
constexpr int64_t kMostCandidates = 32;  // granules per row, on average, past which the fp32 pass is faster
}  // namespace codebook_quantize

namespace cpu {
// metric: 0 = l2, 1 = inner product. All arrays are contiguous fp32, indices int64. Throws std::bad_alloc.
void codebook_quantize(const float* z, const float* z2, const float* codebook, const float* e2, int64_t n, int64_t k,
                       int64_t d, int metric, int64_t* indices, float* quantized);
}  // namespace cpu

}  // namespace gear

// Codes per panel; packs codes [first, first + width) into panel and bias; quantizes rows [first, last) with `scratch`
// of scratch_floats(...) floats.
GEAR_DECLARE_ISA(int64_t, codebook_panel_width, ())
GEAR_DECLARE_ISA(void, codebook_pack_panel,
                 (const gear::QuantizeProblem& problem, int64_t first_code, float* panel, float* bias))
GEAR_DECLARE_ISA(int64_t, codebook_scratch_floats, (const gear::QuantizeProblem& problem, int64_t padded_k))
GEAR_DECLARE_ISA(void, codebook_quantize_rows,
                 (const gear::QuantizeProblem& problem, const gear::PackedCodebook& packed, int64_t first, int64_t last,
                  float* scratch))

#ifdef GEAR_X86
// For machines with AMX.
namespace gear::avx512 {
int64_t codebook_tile_slots(const QuantizeProblem& problem);
// Packs one granule into slots [kGranule][n_slots]; max_norms[3]: the norms of TiledCodebook over the granule.
void codebook_tile_pack(const QuantizeProblem& problem, int64_t granule, int64_t n_slots, uint16_t* slots,
                        float* max_norms);
int64_t codebook_tile_scratch_bytes(const TiledCodebook& codes, int64_t block_rows);
// Quantizes rows [first, last), at most block_rows (a multiple of 32, at most kMostTileRows). False: the block has to
// take the fp32 passes, and what is in its indices is void.
bool codebook_tile_rows(const QuantizeProblem& problem, const TiledCodebook& codes, int64_t first, int64_t last,
                        int64_t block_rows, char* memory);
}  // namespace gear::avx512
#endif
