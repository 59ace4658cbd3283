#include "cuda/codebook_quantize.h"

#include "emulated.h"

namespace {

using gear::emulated::check;
using gear::emulated::normal;

void quantize(int metric) {
  constexpr std::int64_t n = 11, k = 300, d = 5;
  const std::vector<float> z = normal(n * d, 1), e = normal(k * d, 2);
  std::vector<float> z2(n), e2(k), quantized(n * d);
  for (std::int64_t i = 0; i < n * d; ++i) z2[i / d] += z[i] * z[i];
  for (std::int64_t i = 0; i < k * d; ++i) e2[i / d] += e[i] * e[i];
  std::vector<std::int64_t> indices(n);
  gear::cuda::codebook_quantize(z.data(), z2.data(), e.data(), e2.data(), n, k, d, metric, indices.data(),
                                quantized.data(), nullptr);
  for (std::int64_t row = 0; row < n; ++row) {
    double best = -1e30;
    std::int64_t winner = 0;
    for (std::int64_t code = 0; code < k; ++code) {
      double dot = 0.0;
      for (std::int64_t i = 0; i < d; ++i) dot += double{z[row * d + i]} * double{e[code * d + i]};
      const double score = metric == 1 ? dot : 2.0 * dot - double{e2[code]};
      if (score > best) best = score, winner = code;
    }
    check(indices[row] == winner, "nearest code");
    for (std::int64_t i = 0; i < d; ++i) check(quantized[row * d + i] == e[winner * d + i], "its vector");
  }
}

}  // namespace

GEAR_CASE(codebook_quantize) {
  quantize(0);
  quantize(1);
}
