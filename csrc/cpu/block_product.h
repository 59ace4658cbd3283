// Products of small fp32 blocks: out [rows, width] (+)= a [rows, depth] . b [depth, width], for operands that stay in
// the caches. One code for every product of the read-outs, transposed left operands included: a is taken by two
// strides.
//
// Column strips of b are packed into 8 KB (16 KB with AVX-512), which stay in L1 while all rows pass; tiles of 6 rows
// and 2 vectors keep their sums in registers. An output element is a chain of fused multiply-adds in ascending order of
// the depth, whatever the number of rows: results do not depend on the other rows.
//
// Include it in files that are compiled once per instruction set; everything lives in namespace gear::GEAR_ISA.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace gear::GEAR_ISA {

struct Block {
  const float* data;
  int64_t row, column;  // strides in elements
};

namespace block_product_detail {

constexpr int kTile = 6, kVectors = 2;  // 12 accumulators
constexpr int kDepth = 128;

// One tile of R rows and V vectors; b is packed [depth][V * kLanes].
template <int R, int V>
inline void tile(const float* a, int64_t a_row, int64_t a_depth, const float* b, int depth, bool add_to, float* out,
                 int64_t out_row) {
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = add_to ? load(out + r * out_row + v * kLanes) : zero();
  for (int k = 0; k < depth; ++k) {
    Vec right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load(b + (k * V + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec left = splat(a[r * a_row + k * a_depth]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = fma(left, right[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + r * out_row + v * kLanes, acc[r][v]);
}

using Tile = void (*)(const float*, int64_t, int64_t, const float*, int, bool, float*, int64_t);
template <int V>
constexpr Tile kTiles[kTile] = {tile<1, V>, tile<2, V>, tile<3, V>, tile<4, V>, tile<5, V>, tile<6, V>};

// All rows of one strip of V vectors, of which `width` columns exist.
template <int V>
void strip(int64_t rows, int depth, int width, Block a, const float* packed, bool add_to, float* out, int64_t out_row) {
  constexpr int kWidth = V * kLanes;
  for (int64_t begin = 0; begin < rows; begin += kTile) {
    const int used = static_cast<int>(rows - begin < kTile ? rows - begin : kTile);
    const float* left = a.data + begin * a.row;
    float* target = out + begin * out_row;
    if (width == kWidth) {
      kTiles<V>[used - 1](left, a.row, a.column, packed, depth, add_to, target, out_row);
      continue;
    }
    float padded[kTile * kWidth] = {};
    for (int r = 0; add_to && r < used; ++r)
      for (int i = 0; i < width; ++i) padded[r * kWidth + i] = target[r * out_row + i];
    kTiles<V>[used - 1](left, a.row, a.column, packed, depth, add_to, padded, kWidth);
    for (int r = 0; r < used; ++r)
      for (int i = 0; i < width; ++i) target[r * out_row + i] = padded[r * kWidth + i];
  }
}

// b's columns [begin, begin + width) in V vectors, zeros behind them.
template <int V>
inline void pack(const float* b, int64_t b_row, int depth, int width, float* packed) {
  constexpr int kWidth = V * kLanes;
  for (int k = 0; k < depth; ++k, packed += kWidth) {
    if (width == kWidth) {
      for (int v = 0; v < V; ++v) store(packed + v * kLanes, load(b + k * b_row + v * kLanes));
    } else {
      for (int i = 0; i < kWidth; ++i) packed[i] = i < width ? b[k * b_row + i] : 0.0f;
    }
  }
}

}  // namespace block_product_detail

// See the top. b: rows of b_row elements, its columns contiguous; add_to: to what out holds.
inline void block_product(int64_t rows, int64_t depth, int64_t width, Block a, const float* b, int64_t b_row,
                          bool add_to, float* out, int64_t out_row) {
  using namespace block_product_detail;
  alignas(64) float packed[kDepth * kVectors * kLanes];
  for (int64_t column = 0; column < width; column += kVectors * kLanes) {
    const int left = static_cast<int>(width - column < kVectors * kLanes ? width - column : kVectors * kLanes);
    for (int64_t begin = 0; begin < depth; begin += kDepth) {
      const int part = static_cast<int>(depth - begin < kDepth ? depth - begin : kDepth);
      const Block rest{a.data + begin * a.column, a.row, a.column};
      const float* right = b + begin * b_row + column;
      const bool sums = add_to || begin > 0;
      if (left > kLanes) {
        pack<kVectors>(right, b_row, part, left, packed);
        strip<kVectors>(rows, part, left, rest, packed, sums, out + column, out_row);
      } else {
        pack<1>(right, b_row, part, left, packed);
        strip<1>(rows, part, left, rest, packed, sums, out + column, out_row);
      }
    }
  }
}

}  // namespace gear::GEAR_ISA
