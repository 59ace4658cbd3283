// Entry point of soft_readout: transposes the codebook once and shares blocks of rows among threads. See the header.
#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/soft_readout.h"

namespace gear::cpu {

void soft_readout(const float* z, const float* codebook, const float* bias, const float* table, int64_t n, int64_t k,
                  int64_t d, int64_t c, float scale, float* out) {
  using gear::soft_readout::kCodes;
  using gear::soft_readout::kRows;
  const SoftReadout call{z, codebook, bias, table, n, k, d, c, scale, out};
  const int64_t blocks = (k + kCodes - 1) / kCodes;
  std::vector<float> panels(static_cast<size_t>(blocks * kCodes * d), 0.0f);
  parallel_for(blocks, [&](int64_t block) noexcept {
    float* panel = panels.data() + block * kCodes * d;
    for (int64_t code = block * kCodes; code < std::min(k, (block + 1) * kCodes); ++code)
      for (int64_t i = 0; i < d; ++i) panel[i * kCodes + code - block * kCodes] = codebook[code * d + i];
  });
  parallel_for((n + kRows - 1) / kRows, [&](int64_t task) noexcept {
    GEAR_DISPATCH(soft_readout_rows)(call, panels.data(), task * kRows, std::min(n, (task + 1) * kRows));
  });
}

}  // namespace gear::cpu
