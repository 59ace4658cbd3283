// sign_bits on a GPU; arguments and result as gear::cpu::sign_bits, on the given stream.
#pragma once

#include <cstdint>

namespace gear::cuda {
void sign_bits(const float* z, std::int64_t row_stride, std::int64_t channel_stride, std::int64_t n, std::int64_t d,
               std::int64_t groups, std::int64_t* indices, float* signs, void* stream);
}  // namespace gear::cuda
