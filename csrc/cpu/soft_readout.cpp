// soft_readout for one block of rows, compiled once per instruction set. See soft_readout.h.
#include "cpu/soft_readout.h"

#include "cpu/block_product.h"

namespace gear::GEAR_ISA {
namespace {

using gear::soft_readout::kCodes;
using gear::soft_readout::kRows;
static_assert(kCodes % kLanes == 0, "blocks hold whole vectors");

// State of the online softmax of one row.
struct Running {
  float maximum, sum;
};

// z . e -> weights exp(scale (z . e + bias) - maximum), 0 past the last code; returns what the row's earlier sums have
// to be multiplied by.
float advance(const SoftReadout& call, const float* bias, int used, float* scores, Running& running) {
  for (int code = 0; code < used; ++code) scores[code] = call.scale * (scores[code] + bias[code]);
  for (int code = used; code < kCodes; ++code) scores[code] = -__builtin_inff();
  Vec top = load(scores);
  for (int i = kLanes; i < kCodes; i += kLanes) top = max(top, load(scores + i));
  const float here = max(top);
  const float maximum = here > running.maximum ? here : running.maximum;
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

}  // namespace

void soft_readout_rows(const SoftReadout& call, const float* panels, int64_t first, int64_t last) {
  const int64_t rows = last - first, d = call.d, c = call.c;
  float* out = call.out + first * c;
  float scores[kRows][kCodes];
  Running running[kRows];
  for (Running& row : running) row = {-__builtin_inff(), 0.0f};
  for (int64_t begin = 0; begin < call.k; begin += kCodes) {
    const int used = static_cast<int>(call.k - begin < kCodes ? call.k - begin : kCodes);
    block_product(rows, d, kCodes, {call.z + first * d, d, 1}, panels + begin * d, kCodes, false, scores[0], kCodes);
    for (int64_t r = 0; r < rows; ++r) {
      const float rescale = advance(call, call.bias + begin, used, scores[r], running[r]);
      if (begin > 0 && rescale != 1.0f)
        for (int64_t column = 0; column < c; ++column) out[r * c + column] *= rescale;
    }
    block_product(rows, used, c, {scores[0], kCodes, 1}, call.table + begin * c, c, begin > 0, out, c);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t column = 0; column < c; ++column) out[r * c + column] /= running[r].sum;
    if (call.lse != nullptr) call.lse[first + r] = running[r].maximum + __builtin_logf(running[r].sum);
  }
}

}  // namespace gear::GEAR_ISA
