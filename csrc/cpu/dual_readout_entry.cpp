// Entry point of dual_readout's backward pass: chunks of rows, two phases each. See the header.
#include <algorithm>
#include <vector>

#include "cpu/dual_readout.h"
#include "cpu/parallel.h"
#include "cpu/soft_readout.h"

namespace gear::cpu {

void dual_readout_backward(const float* grad, const float* delta, const float* lse, const float* z,
                           const float* codebook, const float* bias, const float* table, int64_t n, int64_t k,
                           int64_t d, int64_t c, float scale, float* dz, float* dcodebook, float* dbias,
                           float* dtable) {
  using dual_readout::kChunk;
  using dual_readout::kRows;
  using gear::soft_readout::kCodes;
  const DualReadoutBackward call{grad, delta, lse, z, codebook, bias, n, k, d, c, scale, dz, dcodebook, dbias, dtable};
  const int64_t blocks = gear::soft_readout::blocks(k);
  const bool scores = dz != nullptr || dcodebook != nullptr;
  std::vector<float> code_panels(static_cast<size_t>(blocks * kCodes * d), 0.0f);
  std::vector<float> table_panels(scores ? static_cast<size_t>(blocks * kCodes * c) : 0, 0.0f);
  std::vector<float> scratch(dz != nullptr ? static_cast<size_t>(blocks * kCodes * std::min<int64_t>(n, kChunk)) : 0);
  gear::soft_readout::transpose(codebook, k, d, code_panels.data());
  if (scores) gear::soft_readout::transpose(table, k, c, table_panels.data());

  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t rows = std::min<int64_t>(n - chunk, kChunk);
    parallel_for(blocks, [&](int64_t block) {
      GEAR_DISPATCH(dual_readout_codes)
      (call, code_panels.data() + block * kCodes * d, scores ? table_panels.data() + block * kCodes * c : nullptr,
       block, chunk, chunk + rows, dz != nullptr ? scratch.data() + block * kCodes * rows : nullptr);
    });
    if (dz == nullptr) continue;
    parallel_for((rows + kRows - 1) / kRows, [&](int64_t task) {
      const int64_t first = chunk + task * kRows;
      GEAR_DISPATCH(dual_readout_rows)
      (call, scratch.data(), chunk, rows, first, std::min(chunk + rows, first + kRows));
    });
  }
}

}  // namespace gear::cpu
