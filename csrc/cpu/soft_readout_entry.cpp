// Entry point of soft_readout: transposes the codebook once and shares blocks of rows among threads. See the header.
#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/soft_readout.h"

namespace gear {

void soft_readout::transpose(const float* matrix, int64_t k, int64_t width, float* panels) {
  parallel_for(blocks(k), [&](int64_t block) {
    float* panel = panels + block * kCodes * width;
    const int64_t first = block * kCodes, used = std::min<int64_t>(k - first, kCodes);
    // Sixteen columns at a time: a cache line of every row is read once, and as many lines are written.
    for (int64_t begin = 0; begin < width; begin += 16)
      for (int64_t code = 0; code < used; ++code)
        for (int64_t i = begin; i < std::min(width, begin + 16); ++i)
          panel[i * kCodes + code] = matrix[(first + code) * width + i];
  });
}

void cpu::soft_readout(const float* z, const float* codebook, const float* bias, const float* table, int64_t n,
                       int64_t k, int64_t d, int64_t c, float scale, float* out, float* lse) {
  using gear::soft_readout::kCodes;
  using gear::soft_readout::kRows;
  const SoftReadout call{z, codebook, bias, table, n, k, d, c, scale, out, lse};
  std::vector<float> panels(static_cast<size_t>(gear::soft_readout::blocks(k) * kCodes * d), 0.0f);
  gear::soft_readout::transpose(codebook, k, d, panels.data());
  parallel_for((n + kRows - 1) / kRows, [&](int64_t task) {
    GEAR_DISPATCH(soft_readout_rows)(call, panels.data(), task * kRows, std::min(n, (task + 1) * kRows));
  });
}

}  // namespace gear
