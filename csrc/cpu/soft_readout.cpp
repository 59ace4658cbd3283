// soft_readout for one block of rows, compiled once per instruction set. See soft_readout.h.
#include "cpu/soft_readout.h"

#include "cpu/simd.h"

namespace gear::GEAR_ISA {
namespace {

using gear::soft_readout::kCodes;
using gear::soft_readout::kRows;
constexpr int kTile = 6, kVectors = 2;  // 12 accumulators
constexpr int kWidth = kVectors * kLanes;
static_assert(kCodes % kWidth == 0 && kRows % kTile == 0, "blocks hold whole tiles");

// State of the online softmax of one row.
struct Running {
  float maximum, sum;
};

// Fills scores[kTile][kCodes] with scale * (z . e + bias), -inf past the last code. z: kTile rows, the missing ones
// repeat the first.
void score(const SoftReadout& call, const float* const* z, const float* panel, int64_t first_code, int used,
           float (*scores)[kCodes]) {
  for (int begin = 0; begin < kCodes; begin += kWidth) {
    Vec acc[kTile][kVectors];
    for (auto& row : acc)
      for (Vec& a : row) a = zero();
    for (int64_t i = 0; i < call.d; ++i) {
      Vec code[kVectors];
      for (int v = 0; v < kVectors; ++v) code[v] = load(panel + i * kCodes + begin + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) {
        const Vec x = splat(z[r][i]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, code[v], acc[r][v]);
      }
    }
    for (int r = 0; r < kTile; ++r)
      for (int v = 0; v < kVectors; ++v) store(scores[r] + begin + v * kLanes, acc[r][v]);
  }
  for (int r = 0; r < kTile; ++r) {
    for (int code = 0; code < used; ++code)
      scores[r][code] = call.scale * (scores[r][code] + call.bias[first_code + code]);
    for (int code = used; code < kCodes; ++code) scores[r][code] = -__builtin_inff();
  }
}

// scores -> weights exp(score - maximum); returns what the row's earlier sums have to be multiplied by.
float advance(float* scores, Running& running) {
  Vec top = load(scores);
  for (int i = kLanes; i < kCodes; i += kLanes) top = max(top, load(scores + i));
  float lanes[kLanes];
  store(lanes, top);
  float maximum = running.maximum;
  for (const float lane : lanes) maximum = lane > maximum ? lane : maximum;
  const float rescale = running.maximum == maximum ? 1.0f : __builtin_expf(running.maximum - maximum);
  Vec total = zero();
  for (int i = 0; i < kCodes; i += kLanes) {
    const Vec weight = exp(sub(load(scores + i), splat(maximum)));
    store(scores + i, weight);
    total = add(total, weight);
  }
  running.maximum = maximum;
  running.sum = running.sum * rescale + sum(total);
  return rescale;
}

// out[r] = out[r] * rescale[r] + weights[r] . table, for R rows of width c.
template <int R>
void accumulate(const SoftReadout& call, const float* table, int used, float (*weights)[kCodes], const float* rescale,
                float* const* out) {
  int64_t column = 0;
  for (; column + kWidth <= call.c; column += kWidth) {
    Vec acc[R][kVectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) acc[r][v] = mul(splat(rescale[r]), load(out[r] + column + v * kLanes));
    for (int code = 0; code < used; ++code) {
      Vec row[kVectors];
      for (int v = 0; v < kVectors; ++v) row[v] = load(table + code * call.c + column + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec weight = splat(weights[r][code]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(weight, row[v], acc[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) store(out[r] + column + v * kLanes, acc[r][v]);
  }
  for (; column < call.c; ++column)
    for (int r = 0; r < R; ++r) {
      float acc = rescale[r] * out[r][column];
      for (int code = 0; code < used; ++code) acc += weights[r][code] * table[code * call.c + column];
      out[r][column] = acc;
    }
}

}  // namespace

void soft_readout_rows(const SoftReadout& call, const float* panels, int64_t first, int64_t last) {
  Running running[kRows];
  for (Running& row : running) row = {-__builtin_inff(), 0.0f};
  for (int64_t i = first * call.c; i < last * call.c; ++i) call.out[i] = 0;
  for (int64_t begin = 0; begin < call.k; begin += kCodes) {
    const int used = static_cast<int>(call.k - begin < kCodes ? call.k - begin : kCodes);
    for (int64_t tile = first; tile < last; tile += kTile) {
      const int rows = static_cast<int>(last - tile < kTile ? last - tile : kTile);
      // Missing rows are scored as the first one and dropped.
      const float* z[kTile];
      for (int r = 0; r < kTile; ++r) z[r] = call.z + (tile + (r < rows ? r : 0)) * call.d;
      float scores[kTile][kCodes], rescale[kTile];
      score(call, z, panels + begin * call.d, begin, used, scores);
      for (int r = 0; r < rows; ++r) rescale[r] = advance(scores[r], running[tile - first + r]);
      float* out[kTile];
      for (int r = 0; r < rows; ++r) out[r] = call.out + (tile + r) * call.c;
      const float* table = call.table + begin * call.c;
      if (rows == kTile) {
        accumulate<kTile>(call, table, used, scores, rescale, out);
      } else {
        for (int r = 0; r < rows; ++r) accumulate<1>(call, table, used, scores + r, rescale + r, out + r);
      }
    }
  }
  for (int64_t row = first; row < last; ++row)
    for (int64_t column = 0; column < call.c; ++column) call.out[row * call.c + column] /= running[row - first].sum;
}

}  // namespace gear::GEAR_ISA
