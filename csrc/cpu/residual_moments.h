// Adds or stores convolution output into the residual stream and takes the sums that the next GroupNorm needs.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gear {

// Rows of an image, channels last. Types: 0 fp32, 1 bf16.
struct ResidualRows {
  const void* source;
  int source_type;
  float* residual;  // [rows, width, channels], or null: the sums are the source's own
  bool accumulate;  // residual += source, else residual = source
  // -1: source is [rows, width, channels]. 0 or 1: source is [.., width / 2 + phase_offset, 4, channels] and pixel
  // (y, x) of the result is its entry (y / 2 + (y & 1) * phase_offset, x / 2 + (x & 1) * phase_offset, 2 (y & 1) + (x &
  // 1)).
  int phase_offset;
  double* moments;  // [rows, groups, 2]: sum and sum of squares
  std::int64_t width;
  std::int64_t channels;  // a multiple of 16
  std::int64_t groups;
};

}  // namespace gear

GEAR_DECLARE_ISA(void, residual_moments_row, (const ResidualRows& call, std::int64_t row))

namespace gear::cpu {

void residual_moments(const void* source, int source_type, float* residual, bool accumulate, int phase_offset,
                      double* moments, std::int64_t rows, std::int64_t width, std::int64_t channels,
                      std::int64_t groups);

}  // namespace gear::cpu
