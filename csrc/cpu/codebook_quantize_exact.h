// codebook_quantize: the official choice among candidate codes, and how far from it a proposal can be.
//
// Error bound. Let s_k = z . e_k - |e_k|^2 / 2 (inner product: z . e_k) in real numbers, from the given fp32 values,
// and u = 2^-24. A sum of m fp32 products, fused or not, in any order, is off by at most m u times the sum of its
// terms' magnitudes, to first order. With P = |z| max|e| and E = max|e|^2:
//
//   proposal, fp32    d products and a bias:                                            p  = u (d + 2) (P + E / 2)
//   proposal, bf16    see codebook_quantize_tiles.cpp
//   formula, l2       D_k / 2 = |z|^2 / 2 - s_k, off by the chain (u d P), by the rounding of |z|^2 + |e|^2 (at most
//                     u (|z|^2 + E) / 2) and by that of the difference (u (|z|^2 + E + 2 P) / 2):
//                                                                                       f  = u (d P + |z|^2 + E + P)
//   formula, product  the chain, and codes up to 2^-25 below the best that count as equal:  f  = u d P + 2^-25
//
// The official index is among the codes whose proposal is within 2 (p + f) of the best proposal: once for the best
// code, once for the other. One per cent covers the terms of second order; gradual underflow adds less than 2^-125 for
// every operation. Only bounds below 2^100 are used: no sum of the formula can then overflow.
#pragma once

#include <cmath>

#include "cpu/codebook_quantize.h"

namespace gear::GEAR_ISA {

constexpr double kUnitRoundoff = 0x1p-24;
constexpr double kLargestBound = 0x1p100;

// 2 (p + f), for a proposal with the error p.
inline double proposal_slack(const QuantizeProblem& problem, double proposal_error, double z_norm2, double max_norm2) {
  const double d = static_cast<double>(problem.d), product = std::sqrt(z_norm2 * max_norm2);
  const double formula_error = problem.metric == Metric::l2
                                   ? kUnitRoundoff * (d * product + z_norm2 + max_norm2 + product)
                                   : kUnitRoundoff * d * product + 0x1p-25;
  return 2 * 1.01 * (proposal_error + formula_error) + (d + 4) * 0x1p-124;
}

inline double fp32_proposal_slack(const QuantizeProblem& problem, double z_norm2, double max_norm2) {
  const double d = static_cast<double>(problem.d);
  const double error = kUnitRoundoff * (d + 2) * (std::sqrt(z_norm2 * max_norm2) + max_norm2 / 2);
  return proposal_slack(problem, error, z_norm2, max_norm2);
}

// top - slack, rounded down.
inline float candidate_threshold(float top, double slack) {
  const float threshold = static_cast<float>(top - slack);
  return threshold - std::fabs(threshold) * 0x1p-23f;
}

// The best code so far under the formula of codebook_quantize.h. A NaN is the smallest distance and the largest
// product, and the first one wins, as torch's argmin and max have it.
class Best {
 public:
  Best(const QuantizeProblem& problem, int64_t row)
      : problem_(problem),
        z_(problem.z + row * problem.d),
        z2_(problem.metric == Metric::l2 ? problem.z2[row] : 0.0f) {}

  void offer(int64_t code) {
    const float score = score_of(code);
    const bool better = is_nan(score) ? !is_nan(score_) || code < code_
                                      : !is_nan(score_) && (score > score_ || (score == score_ && code < code_));
    if (code_ < 0 || better) {
      score_ = score;
      code_ = code;
    }
  }

  // Inner product: a lower code within the rounding of exp() to 1 takes the place of the best one.
  void offer_tie(int64_t code) {
    if (code < tie_ && score_ - score_of(code) <= 0x1p-25f) tie_ = code;
  }
  // A largest product that is not finite makes every p of the softmax NaN, of which argmax takes the first.
  void settle_ties() {
    code_ = tie_ < code_ ? tie_ : code_;
    if (problem_.metric == Metric::inner_product && !std::isfinite(score_)) code_ = 0;
  }

  int64_t code() const { return code_; }

 private:
  static bool is_nan(float x) { return x != x; }

  // Larger is better: minus the distance, or the product.
  float score_of(int64_t code) const {
    const float* e = problem_.codebook + code * problem_.d;
    float dot = z_[0] * e[0];
    for (int64_t i = 1; i < problem_.d; ++i) dot = __builtin_fmaf(z_[i], e[i], dot);
    if (problem_.metric == Metric::inner_product) return dot;
    return -((z2_ + problem_.e2[code]) - 2 * dot);
  }

  const QuantizeProblem& problem_;
  const float* z_;
  float z2_;
  float score_ = 0;
  int64_t code_ = -1;
  int64_t tie_ = INT64_MAX;
};

}  // namespace gear::GEAR_ISA
