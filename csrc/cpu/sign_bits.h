// Lookup-free quantization: the signs of a latent vector, and their bits as integers. See ops/sign_bits.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gear {

// Element (row, channel) lies at z[row * row_stride + channel * channel_stride].
struct SignBits {
  const float* z;
  std::int64_t row_stride, channel_stride, channels, groups;
  std::int64_t* indices;
  float* signs;
};

}  // namespace gear

GEAR_DECLARE_ISA(void, sign_bits_rows, (const SignBits& call, std::int64_t first, std::int64_t last))

namespace gear::cpu {
// z: fp32, as SignBits. indices: [n, groups], bit i of a group of d / groups <= 62 channels is 1 where its channel i is
// > 0 (so zero and NaN count as negative). signs: [n, d], +1 or -1.
void sign_bits(const float* z, std::int64_t row_stride, std::int64_t channel_stride, std::int64_t n, std::int64_t d,
               std::int64_t groups, std::int64_t* indices, float* signs);
}  // namespace gear::cpu
