// GroupNorm, scale and shift, and SiLU in one pass over channels-last rows, from moments taken before
// (residual_moments).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gear {

// y = silu(x * scale + shift) (or without silu), per channel; one image row of `width` pixels. Types: 0 fp32, 1 bf16.
struct ScaledRows {
  const void* x;
  int x_type;
  void* y;
  int y_type;
  std::int64_t width;
  std::int64_t channels;  // a multiple of 16
  const float* scale;
  const float* shift;
  bool silu;
};

}  // namespace gear

GEAR_DECLARE_ISA(void, scale_shift_row, (const ScaledRows& call, std::int64_t row))

namespace gear::cpu {

// x, y: [rows, width, channels]. moments: [moment_rows, groups, 2] sums and sums of squares over `width * channels /
// groups` numbers each. weight, bias: [channels] or null.
void group_norm_silu(const void* x, int x_type, void* y, int y_type, std::int64_t rows, std::int64_t width,
                     std::int64_t channels, const double* moments, std::int64_t moment_rows, std::int64_t groups,
                     const float* weight, const float* bias, double eps, bool silu);

}  // namespace gear::cpu
