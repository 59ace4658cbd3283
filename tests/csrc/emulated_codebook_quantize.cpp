// codebook_quantize: indices equal to a plain loop of the official formula, rounding by rounding.
#include "cuda/codebook_quantize.h"

#include <cmath>
#include <cstdio>

#include "device.h"
#include "emulated.h"

namespace {

using gear::emulated::check;
using gear::emulated::Device;
using gear::emulated::normal;

struct Codes {
  std::vector<float> z, e;
  std::int64_t n, k, d;
};

Codes random_codes(std::int64_t n, std::int64_t k, std::int64_t d) {
  return {normal(static_cast<std::size_t>(n * d), 1), normal(static_cast<std::size_t>(k * d), 2), n, k, d};
}

std::vector<float> norms(const std::vector<float>& vectors, std::int64_t d) {
  std::vector<float> found(vectors.size() / static_cast<std::size_t>(d));
  for (std::size_t i = 0; i < vectors.size(); ++i) found[i / d] += vectors[i] * vectors[i];
  return found;
}

// The index that csrc/cpu/codebook_quantize.h defines.
std::int64_t official(const Codes& codes, const std::vector<float>& z2, const std::vector<float>& e2, std::int64_t row,
                      bool inner_product) {
  std::vector<float> scores;
  for (std::int64_t code = 0; code < codes.k; ++code) {
    const float *z = &codes.z[row * codes.d], *e = &codes.e[code * codes.d];
    float dot = z[0] * e[0];
    for (std::int64_t i = 1; i < codes.d; ++i) dot = std::fma(z[i], e[i], dot);
    scores.push_back(inner_product ? dot : -((z2[row] + e2[code]) - 2 * dot));
  }
  std::int64_t best = 0;
  for (std::int64_t code = 1; code < codes.k; ++code) {
    const bool first_nan = std::isnan(scores[code]) && !std::isnan(scores[best]);
    if (scores[code] > scores[best] || first_nan) best = code;
  }
  if (!inner_product) return best;
  if (!std::isfinite(scores[best])) return 0;
  for (std::int64_t code = 0; code < best; ++code)
    if (scores[best] - scores[code] <= 0x1p-25f) return code;
  return best;
}

void compare(const Codes& codes, int metric) {
  const std::vector<float> z2 = norms(codes.z, codes.d), e2 = norms(codes.e, codes.d);
  const Device<float> z(codes.z), e(codes.e), z_norms(z2), e_norms(e2), quantized(codes.z.size());
  const Device<std::int64_t> indices(static_cast<std::size_t>(codes.n));
  const Device<char> workspace(gear::cuda::codebook_quantize_workspace(codes.n, codes.k, codes.d, metric));
  gear::cuda::codebook_quantize(z.data(), z_norms.data(), e.data(), e_norms.data(), codes.n, codes.k, codes.d, metric,
                                indices.data(), quantized.data(), workspace.data(), nullptr);
  const std::vector<std::int64_t> found = indices.values();
  const std::vector<float> vectors = quantized.values();
  for (std::int64_t row = 0; row < codes.n; ++row) {
    check(found[row] == official(codes, z2, e2, row, metric == 1), "the official index");
    for (std::int64_t i = 0; i < codes.d; ++i) {
      const float x = vectors[row * codes.d + i], y = codes.e[found[row] * codes.d + i];
      check(x == y || (std::isnan(x) && std::isnan(y)), "its vector");
    }
  }
}

}  // namespace

GEAR_CASE(codebook_quantize) { compare(random_codes(9, 40, 260), 1); }  // every code by the official formula

GEAR_CASE(codebook_quantize_three_terms) { compare(random_codes(34, 260, 8), 0); }

GEAR_CASE(codebook_quantize_two_terms) { compare(random_codes(9, 130, 14), 0); }

GEAR_CASE(codebook_quantize_wide) {
  compare(random_codes(5, 65, 250), 1);
  compare(random_codes(3, 10, 100), 0);
}

GEAR_CASE(codebook_quantize_ties) {
  Codes codes = random_codes(3, 256, 8);
  for (std::int64_t i = 0; i < 128 * 8; ++i) codes.e[128 * 8 + i] = codes.e[i];  // every code twice, two tiles apart
  compare(codes, 0);
  for (float& x : codes.e) x *= 1e-5f;  // products that the softmax does not tell apart
  compare(codes, 1);
}

GEAR_CASE(codebook_quantize_not_finite) {
  Codes codes = random_codes(6, 10, 5);
  codes.z[7] = std::nanf("");
  codes.z[11] = 1e30f;
  codes.z[16] = INFINITY;
  compare(codes, 1);
  codes.e[8] = std::nanf("");
  compare(codes, 0);
}
