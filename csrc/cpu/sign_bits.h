// Lookup-free quantization: the signs of a latent vector, and their bits as integers. See ops/sign_bits.py.
#pragma once

#include <cstdint>

namespace gear::cpu {
// z: element (row, channel) at z[row * row_stride + channel * channel_stride], fp32. indices: [n, groups], bit i of a
// group is 1 where its channel i is > 0 (so zero and NaN count as negative). signs: [n, d], +1 or -1.
void sign_bits(const float* z, int64_t row_stride, int64_t channel_stride, int64_t n, int64_t d, int64_t groups,
               int64_t* indices, float* signs);
}  // namespace gear::cpu
