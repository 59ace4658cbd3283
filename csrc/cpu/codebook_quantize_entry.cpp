// Entry point of codebook_quantize: packs the codebook once and shares blocks of rows among threads. See the header.
#include "cpu/codebook_quantize.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/parallel.h"

namespace gear::cpu {

void codebook_quantize(const float* z, const float* z2, const float* codebook, const float* e2, int64_t n, int64_t k,
                       int64_t d, int metric, int64_t* indices, float* quantized) {
  using namespace gear::codebook_quantize;
  const QuantizeProblem problem{z, z2, codebook, e2, n, k, d, static_cast<Metric>(metric), indices, quantized};
  if (n == 0) return;

  // Pack. Norms for the error bound are taken in double: they only have to be upper bounds after a little inflation.
  const int64_t width = GEAR_DISPATCH(codebook_panel_width)();
  const int64_t padded_k = (k + kGroup - 1) / kGroup * kGroup;
  // Not vectors: these are large, and written before they are read.
  const std::unique_ptr<float[]> panels(new float[static_cast<size_t>(padded_k * d)]);
  std::vector<float> bias(static_cast<size_t>(padded_k));
  std::vector<double> norms(static_cast<size_t>(padded_k / kGroup), 0.0);
  parallel_for(padded_k / kGroup, [&](int64_t group) noexcept {
    for (int64_t code = group * kGroup; code < (group + 1) * kGroup; code += width)
      GEAR_DISPATCH(codebook_pack_panel)(problem, code, panels.get() + code * d, bias.data() + code);
    double largest = 0;
    for (int64_t code = group * kGroup; code < std::min(k, (group + 1) * kGroup); ++code) {
      double norm2 = 0;
      for (int64_t i = 0; i < d; ++i) norm2 += static_cast<double>(codebook[code * d + i]) * codebook[code * d + i];
      largest = norm2 > largest || norm2 != norm2 ? norm2 : largest;  // a NaN stays
    }
    norms[static_cast<size_t>(group)] = largest;
  });
  double max_norm2 = 0;
  for (const double norm2 : norms) max_norm2 = norm2 > max_norm2 || norm2 != norm2 ? norm2 : max_norm2;
  const PackedCodebook packed{panels.get(), bias.data(), padded_k, max_norm2};

  // Blocks of rows are handed out one by one; each thread that takes part has scratch of its own.
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
  const int64_t workers = std::min<int64_t>(blocks, num_threads());
  const int64_t scratch_floats = GEAR_DISPATCH(codebook_scratch_floats)(problem, padded_k);
  const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(workers * scratch_floats)]);
  std::atomic<int64_t> next{0};
  parallel_for(workers, [&](int64_t worker) noexcept {
    for (int64_t block = next++; block < blocks; block = next++) GEAR_DISPATCH(codebook_quantize_rows)
    (problem, packed, block * kBlockRows, std::min(n, (block + 1) * kBlockRows),
     scratch.get() + worker * scratch_floats);
  });
}

}  // namespace gear::cpu
