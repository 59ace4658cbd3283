// A linear layer for few rows with the norm before it and the SwiGLU or residual after it; see ops/skinny_linear.py.
//
// Bits of a row's result depend on the row, the weights and the instruction set only: not on the number of threads, on
// how many rows there are, or on the row's place among them. Every accumulator sees the reduction dimension in one
// order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace gear {

enum class Dtype : int { f32 = 0, bf16 = 1 };
enum class WeightKind : int { f32_rows = 0, bf16_rows = 1, bf16_panels = 2, int8_panels = 3 };

// One call. Rows of x, residual and y are contiguous; `activation` is the dtype of x, norm_weight and residual.
struct Linear {
  std::int64_t rows, in_features, out_features;
  Dtype activation;
  Dtype output;  // of y
  WeightKind kind;
  const void* x;
  const void* norm_weight;  // or null
  float norm_eps;
  const void* weight;
  const float* scales;  // int8 only
  const void* gate;     // or null: a second weight of the same kind
  const float* gate_scales;
  const void* residual;  // or null; may be y
  void* y;
};

// The rows of x, normalised and in the form that the weight's kernel multiplies with: fp32 for weights in place, bf16
// or int8 (with a scale per row) for panels; without dot products (wide_panels) the same values as fp32 or int16. Zeros
// fill a row up to `stride`.
struct Operand {
  void* data;
  float* row_scales;    // int8 only
  std::int64_t stride;  // bytes from row to row
  bool wide;
};

// Accumulators of a block of outputs for a block of rows.
constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;
struct Tile {
  alignas(64) float values[kTileRows][kTileColumns];
};

// Fills tile[0 … n_rows) x [0 … n_columns) with products; int8 products come scaled.
struct TileTask {
  const Linear* call;
  const Operand* operand;
  const void* weight;
  const float* scales;
  std::int64_t first_row;
  int n_rows;
  std::int64_t first_column;
  int n_columns;
  // What the thread is likely to multiply with after this.
  const void* next_weight;
  std::int64_t next_column;
};

// Memory of the calling thread, 64-byte aligned, valid until its next request under the same `purpose`.
enum class Scratch : int { operand, wide_row, attention, hidden, sampler, convolution, count };
void* scratch(Scratch purpose, std::size_t bytes);

namespace cpu {

void linear(const Linear& call);

void skinny_linear(const void* x, int activation, std::int64_t rows, std::int64_t in_features,
                   std::int64_t out_features, const void* norm_weight, float norm_eps, int kind, const void* weight,
                   const float* scales, const void* gate, const float* gate_scales, const void* residual, void* y);

}  // namespace cpu
}  // namespace gear

GEAR_DECLARE_ISA(void, linear, (const Linear& call))
GEAR_DECLARE_ISA(void, linear_rows, (const TileTask& task, Tile& tile))
GEAR_DECLARE_ISA(void, linear_panels, (const TileTask& task, Tile& tile))
// Whether linear_panels wants the rows of x widened.
GEAR_DECLARE_ISA(bool, wide_panels, (gear::WeightKind kind))
// Sums in int32, stored where the tile's floats go, become floats times the row's and the column's scale.
GEAR_DECLARE_ISA(void, scale_int8_products, (const TileTask& task, Tile& tile))

#ifdef GEAR_X86
namespace gear::avx512 {
void linear_amx(const TileTask& task, Tile& tile);
}
#endif
