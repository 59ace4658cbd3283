// Products with weights in place: row-major (out_features, in_features), fp32 or bf16.
//
// An accumulator is one vector per (output, row): lane l sums the k with k % lanes == l in order, then the lanes are
// added in a fixed tree. How outputs and rows are blocked changes which accumulators live together, never their order.
#include "cpu/simd.h"
#include "cpu/skinny_linear.h"

namespace gear::GEAR_ISA {
namespace {

constexpr int kOutputs = 4;
constexpr int kRowsAtOnce = kRegisters == 32 ? 4 : 3;

// One block: kOutputs x kRows accumulators. `ahead` is prefetched alongside, one line per step: with several rows this
// is bound by arithmetic, and the next outputs' weights arrive meanwhile.
template <class W, int kRows, bool kPrefetch>
inline void block(const W* const (&weight)[kOutputs], const float* x, std::int64_t stride, std::int64_t in_features,
                  const W* ahead, float* out) {
  Vec total[kOutputs][kRows];
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) total[o][r] = zero();
  const auto step = [&](std::int64_t k, auto load_weight) __attribute__((always_inline)) {
    Vec w[kOutputs];
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) w[o] = load_weight(weight[o] + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec v = load(x + r * stride + k);
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) total[o][r] = fma(w[o], v, total[o][r]);
    }
  };
  std::int64_t k = 0;
  for (; k + kLanes <= in_features; k += kLanes) {
    if constexpr (kPrefetch) __builtin_prefetch(ahead + k, 0, 2);
    step(k, [](const W* p) __attribute__((always_inline)) { return load(p); });
  }
  if (k < in_features) {
    const int rest = static_cast<int>(in_features - k);
    step(k, [rest](const W* p) __attribute__((always_inline)) { return load_first(p, rest); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) out[r * kTileColumns + o] = sum(total[o][r]);
}

template <class W>
void rows(const TileTask& task, Tile& tile) {
  const std::int64_t k = task.call->in_features;
  const std::int64_t stride = task.operand->stride / 4;
  const std::int64_t n_outputs = task.call->out_features;
  const float* x = static_cast<const float*>(task.operand->data) + task.first_row * stride;
  for (int column = 0; column < task.n_columns; column += kOutputs) {
    const std::int64_t first = task.first_column + column;
    const W* weight[kOutputs];
    for (int o = 0; o < kOutputs; ++o) {
      // Outputs past the end repeat the last one; they land in columns that nobody reads.
      const std::int64_t output = first + o < n_outputs ? first + o : n_outputs - 1;
      weight[o] = static_cast<const W*>(task.weight) + output * k;
    }
    float* out = &tile.values[0][column];
    int r = 0;
    for (; r + kRowsAtOnce <= task.n_rows; r += kRowsAtOnce) {
      std::int64_t next = first + kOutputs + r / kRowsAtOnce % kOutputs;
      if (next >= n_outputs) next = n_outputs - 1;
      const W* ahead = static_cast<const W*>(task.weight) + next * k;
      block<W, kRowsAtOnce, true>(weight, x + r * stride, stride, k, ahead, out + r * kTileColumns);
    }
    const float* rest = x + r * stride;
    out += r * kTileColumns;
    switch (task.n_rows - r) {
      case 3:
        block<W, 3, false>(weight, rest, stride, k, nullptr, out);
        break;
      case 2:
        block<W, 2, false>(weight, rest, stride, k, nullptr, out);
        break;
      case 1:
        block<W, 1, false>(weight, rest, stride, k, nullptr, out);
        break;
      default:
        break;
    }
  }
}

}  // namespace

void linear_rows(const TileTask& task, Tile& tile) {
  if (task.call->kind == WeightKind::f32_rows) {
    rows<float>(task, tile);
  } else {
    rows<bf16>(task, tile);
  }
}

}  // namespace gear::GEAR_ISA
