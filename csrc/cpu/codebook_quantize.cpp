// codebook_quantize for one block of rows, compiled once per instruction set. See codebook_quantize.h for the contract.
//
// First pass: a tile of kRows rows times a panel of kWidth codes lives in registers, so each code element is loaded
// once per kRows products; the transposed panel makes lanes independent codes and no lane is ever summed across. The
// bias starts the accumulators, so an approximate l2 score costs d multiply-adds and one maximum. Second pass: exact.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/codebook_quantize_exact.h"
#include "cpu/simd.h"

namespace gear::GEAR_ISA {
namespace {

using gear::codebook_quantize::kBlockRows;
using gear::codebook_quantize::kGroup;

#if GEAR_ISA_avx512
constexpr int kRows = 12, kVectors = 2;  // 24 accumulators of 32 registers
#else
constexpr int kRows = 6, kVectors = 2;  // 12 of 16
#endif
constexpr int kWidth = kVectors * kLanes;
constexpr int64_t kPanelBytes = 16 << 10;
static_assert(kGroup % kWidth == 0 && kBlockRows % kRows == 0, "groups hold whole panels, blocks whole tiles");

// Bit l is set where a >= b in lane l.
inline uint32_t mask_ge(Vec a, Vec b) {
#if GEAR_ISA_avx512
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif GEAR_ISA_avx2
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
#else
  float lanes_a[kLanes], lanes_b[kLanes];
  store(lanes_a, a);
  store(lanes_b, b);
  uint32_t mask = 0;
  for (int l = 0; l < kLanes; ++l) mask |= static_cast<uint32_t>(lanes_a[l] >= lanes_b[l]) << l;
  return mask;
#endif
}

// Maxima over the panels [begin, end) of one group of codes, and over those before, for kRows rows. tile: [d][kRows];
// panels: [end - begin][d][kWidth]; maxima: [kRows][stride], of which one vector each is written.
void propose(const float* tile, const float* panels, const float* bias, int64_t d, int begin, int end, float* maxima,
             int64_t stride) {
  for (int panel = begin; panel < end; ++panel, panels += d * kWidth, bias += kWidth) {
    Vec acc[kRows][kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Vec start = load(bias + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r][v] = start;
    }
    for (int64_t i = 0; i < d; ++i) {
      Vec code[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) code[v] = load(panels + i * kWidth + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec x = splat(tile[i * kRows + r]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, code[v], acc[r][v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Vec best = acc[r][0];
#pragma GCC unroll 16
      for (int v = 1; v < kVectors; ++v) best = max(best, acc[r][v]);
      float* kept = maxima + r * stride;
      store(kept, panel == 0 ? best : max(best, load(kept)));
    }
  }
}

// Calls visit(code, score) for the codes of every (group, lane) that reaches the threshold.
template <class Visit>
void for_candidates(const Best& winner, const float* maxima, int64_t groups, int64_t k, float threshold, Visit visit) {
  const Vec bound = splat(threshold);
  for (int64_t group = 0; group < groups; ++group) {
    uint32_t lanes = mask_ge(load(maxima + group * kLanes), bound);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t first = group * kGroup + __builtin_ctz(lanes), end = std::min((group + 1) * kGroup, k);
      const int64_t count = (end - first + kLanes - 1) / kLanes;
      float scores[kGroup / kLanes];
      winner.scores(first, kLanes, count, scores);
      for (int64_t i = 0; i < count; ++i) visit(first + i * kLanes, scores[i]);
    }
  }
}

int64_t decide(const QuantizeProblem& problem, const PackedCodebook& packed, int64_t row, const float* maxima) {
  const int64_t groups = packed.padded_k / kGroup;
  Vec best = load(maxima);
  for (int64_t group = 1; group < groups; ++group) best = max(best, load(maxima + group * kLanes));
  float lanes[kLanes];
  store(lanes, best);
  float top = lanes[0];
  for (int l = 1; l < kLanes; ++l) top = lanes[l] > top ? lanes[l] : top;
  double z_norm2 = 0;
  for (int64_t i = 0; i < problem.d; ++i) {
    const double x = problem.z[row * problem.d + i];
    z_norm2 += x * x;
  }
  const double bound =
      fp32_proposal_slack(static_cast<int>(problem.d), problem.metric == Metric::l2, z_norm2, packed.max_norm2);
  Best winner(problem, row);
  const bool finite = std::isfinite(top) && bound <= kLargestBound;
  const float lower = candidate_threshold(top, bound);
  const bool ties = problem.metric == Metric::inner_product;
  if (finite) {
    const auto offer = [&](int64_t code, float score) { winner.offer(code, score); };
    const auto offer_tie = [&](int64_t code, float score) { winner.offer_tie(code, score); };
    for_candidates(winner, maxima, groups, problem.k, lower, offer);
    if (ties) for_candidates(winner, maxima, groups, problem.k, lower, offer_tie);
  } else {
    for (int64_t code = 0; code < problem.k; ++code) winner.offer(code);
    for (int64_t code = 0; ties && code < problem.k; ++code) winner.offer_tie(code);
  }
  winner.settle_ties();
  return winner.code();
}

}  // namespace

int64_t codebook_panel_width() { return kWidth; }

void codebook_pack_panel(const QuantizeProblem& problem, int64_t first_code, float* panel, float* bias) {
  for (int64_t c = 0; c < kWidth; ++c) {
    const int64_t code = first_code + c;
    const bool real = code < problem.k;
    for (int64_t i = 0; i < problem.d; ++i)
      panel[i * kWidth + c] = real ? problem.codebook[code * problem.d + i] : 0.0f;
    bias[c] = !real ? -__builtin_inff() : problem.metric == Metric::l2 ? -0.5f * problem.e2[code] : 0.0f;
  }
}

int64_t codebook_scratch_floats(const QuantizeProblem& problem, int64_t padded_k) {
  return kBlockRows * problem.d + kBlockRows * (padded_k / kGroup) * kLanes;
}

void codebook_quantize_rows(const QuantizeProblem& problem, const PackedCodebook& packed, int64_t first, int64_t last,
                            float* scratch) {
  const int64_t d = problem.d, groups = packed.padded_k / kGroup, stride = groups * kLanes;
  float* tiles = scratch;                    // [tiles][d][kRows]
  float* maxima = scratch + kBlockRows * d;  // [kBlockRows][groups][kLanes]
  for (int64_t row = first; row < first + kBlockRows; ++row) {
    const int64_t local = row - first;
    float* tile = tiles + local / kRows * kRows * d + local % kRows;
    for (int64_t i = 0; i < d; ++i) tile[i * kRows] = row < last ? problem.z[row * d + i] : 0.0f;
  }
  // So many panels as stay in L1 while all rows pass.
  constexpr int kPanels = kGroup / kWidth;
  const int at_once = static_cast<int>(std::clamp<int64_t>(kPanelBytes / (d * kWidth * 4), 1, kPanels));
  for (int64_t group = 0; group < groups; ++group)
    for (int begin = 0; begin < kPanels; begin += at_once) {
      const int64_t code = group * kGroup + begin * kWidth;
      for (int64_t local = 0; local < last - first; local += kRows)
        propose(tiles + local * d, packed.panels + code * d, packed.bias + code, d, begin,
                std::min(begin + at_once, kPanels), maxima + local * stride + group * kLanes, stride);
    }
  for (int64_t row = first; row < last; ++row) {
    const int64_t code = decide(problem, packed, row, maxima + (row - first) * stride);
    problem.indices[row] = code;
    std::memcpy(problem.quantized + row * d, problem.codebook + code * d, static_cast<size_t>(d) * sizeof(float));
  }
}

}  // namespace gear::GEAR_ISA
