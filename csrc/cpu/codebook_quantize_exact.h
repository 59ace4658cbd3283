// codebook_quantize: the official choice among candidate codes.
#pragma once

#include <cmath>

#include "common/codebook_bound.h"
#include "cpu/codebook_quantize.h"

namespace gear::GEAR_ISA {

// The best code so far under the formula of codebook_quantize.h. A NaN is the smallest distance and the largest
// product, and the first one wins, as torch's argmin and max have it.
class Best {
 public:
  Best(const QuantizeProblem& problem, int64_t row)
      : problem_(problem),
        z_(problem.z + row * problem.d),
        z2_(problem.metric == Metric::l2 ? problem.z2[row] : 0.0f) {}

  void offer(int64_t code) { offer(code, score_of(code)); }

  void offer(int64_t code, float score) {
    const bool better = is_nan(score) ? !is_nan(score_) || code < code_
                                      : !is_nan(score_) && (score > score_ || (score == score_ && code < code_));
    if (code_ < 0 || better) {
      score_ = score;
      code_ = code;
    }
  }

  // Inner product: a lower code within the rounding of exp() to 1 takes the place of the best one.
  void offer_tie(int64_t code) { offer_tie(code, score_of(code)); }

  void offer_tie(int64_t code, float score) {
    if (code < tie_ && score_ - score <= 0x1p-25f) tie_ = code;
  }

  // scores[i] of code first + i * step, i < count. A product's sums wait for each other: several are made abreast.
  void scores(int64_t first, int64_t step, int64_t count, float* scores) const {
    constexpr int kAbreast = 8;
    const float* e = problem_.codebook + first * problem_.d;
    const int64_t stride = step * problem_.d;
    int64_t i = 0;
    for (; i + kAbreast <= count; i += kAbreast) {
      float dots[kAbreast];
      for (int c = 0; c < kAbreast; ++c) dots[c] = z_[0] * e[(i + c) * stride];
      for (int64_t k = 1; k < problem_.d; ++k)
#pragma GCC unroll 8
        for (int c = 0; c < kAbreast; ++c) dots[c] = __builtin_fmaf(z_[k], e[(i + c) * stride + k], dots[c]);
      for (int c = 0; c < kAbreast; ++c) scores[i + c] = of_dot(dots[c], first + (i + c) * step);
    }
    for (; i < count; ++i) scores[i] = score_of(first + i * step);
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
    return of_dot(dot, code);
  }

  float of_dot(float dot, int64_t code) const {
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
