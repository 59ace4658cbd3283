// codebook_quantize: how far a proposal's score can be from the official one, shared by CPU and CUDA kernels.
//
// Let s_k = z . e_k - |e_k|^2 / 2 (inner product: z . e_k) in real numbers, from the given fp32 values, and u = 2^-24.
// A sum of m fp32 products, fused or not, in any order, is off by at most m u times the sum of its terms' magnitudes,
// to first order. With P = |z| max|e| and E = max|e|^2:
//
//   proposal, fp32    d products and a bias:                                            p  = u (d + 2) (P + E / 2)
//   proposal, bf16    see split_error below, and the kernels for the rounding of their sums
//   formula, l2       D_k / 2 = |z|^2 / 2 - s_k, off by the chain (u d P), by the rounding of |z|^2 + |e|^2 (at most
//                     u (|z|^2 + E) / 2) and by that of the difference (u (|z|^2 + E + 2 P) / 2):
//                                                                                       f  = u (d P + |z|^2 + E + P)
//   formula, product  the chain, and codes up to 2^-25 below the best that count as equal:  f  = u d P + 2^-25
//
// The official index is among the codes whose proposal is within 2 (p + f) of the best proposal: once for the best
// code, once for the other. One per cent covers the terms of second order; gradual underflow adds less than 2^-125 for
// every operation. Only bounds below 2^100 are used: no sum of the formula can then overflow.
//
// Proposals in bf16: each fp32 number is split as x = hi + lo + rest, hi and lo in bf16, and the score of a code is one
// inner product of 2-byte "slots", in as many terms as fit:
//
//   3 terms   z: [hi  lo  hi  1 1 1]     2 terms   z: [hi  lo  1 1 1]     1 term   z: [hi  1 1 1]
//             e: [hi  hi  lo  b b b]               e: [hi  hi  b b b]              e: [hi  b b b]
//
// b: three bf16 pieces of the bias -|e|^2 / 2; they and the ones are absent for inner products.
#pragma once

#include <cmath>

#include "common/host_device.h"

// CPU kernels are compiled once per instruction set: each has its own copies.
#ifdef GEAR_ISA
namespace gear::GEAR_ISA {
#else
namespace gear {
#endif

constexpr double kUnitRoundoff = 0x1p-24;
constexpr double kLargestBound = 0x1p100;
constexpr int kBiasSlots = 3;

// Norms of a vector and of what its split leaves: |x|, |x - hi|, |x - hi - lo|, rounded up.
struct SplitNorms {
  double whole, low, rest;
};

// From sums of squares in fp32 of up to 512 terms; covers their rounding and what underflow took from them.
GEAR_HD inline SplitNorms split_norms(float whole, float low, float rest) {
  return {std::sqrt(static_cast<double>(whole)) * 1.0001 + 0x1p-56,
          std::sqrt(static_cast<double>(low)) * 1.0001 + 0x1p-56,
          std::sqrt(static_cast<double>(rest)) * 1.0001 + 0x1p-56};
}

// What the terms leave out, by Cauchy and Schwarz, from the norms of the residuals themselves. With e = eh + el + re:
//
//     three terms:  z . e - (zh eh + zl eh + zh el) = rz . e + zl . (e - eh) + zh . re
//     two terms:    z . e - (zh eh + zl eh)         = rz . e + (zh + zl) . (e - eh)
//     one term:     z . e - zh eh                   = (z - zh) . e + zh . (e - eh)
GEAR_HD inline double split_error(int terms, const SplitNorms& z, const SplitNorms& e) {
  if (terms == 3) return z.rest * e.whole + z.low * e.low + (z.whole + z.low) * e.rest;
  if (terms == 2) return z.rest * e.whole + (z.whole + z.rest) * e.low;
  return z.low * e.whole + (z.whole + z.low) * e.low;
}

// 2 (p + f), for a proposal with the error p.
GEAR_HD inline double proposal_slack(int width, bool l2, double proposal_error, double z_norm2, double max_norm2) {
  const double d = width, product = std::sqrt(z_norm2 * max_norm2);
  const double formula_error =
      l2 ? kUnitRoundoff * (d * product + z_norm2 + max_norm2 + product) : kUnitRoundoff * d * product + 0x1p-25;
  return 2 * 1.01 * (proposal_error + formula_error) + (d + 4) * 0x1p-124;
}

GEAR_HD inline double fp32_proposal_slack(int width, bool l2, double z_norm2, double max_norm2) {
  const double error = kUnitRoundoff * (width + 2.0) * (std::sqrt(z_norm2 * max_norm2) + max_norm2 / 2);
  return proposal_slack(width, l2, error, z_norm2, max_norm2);
}

// top - slack, rounded down.
GEAR_HD inline float candidate_threshold(float top, double slack) {
  const float threshold = static_cast<float>(top - slack);
  return threshold - std::fabs(threshold) * 0x1p-23f;
}

#ifdef GEAR_ISA
}  // namespace gear::GEAR_ISA
#else
}  // namespace gear
#endif
