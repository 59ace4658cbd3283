#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/sign_bits.h"

namespace gear::cpu {

void sign_bits(const float* z, std::int64_t row_stride, std::int64_t channel_stride, std::int64_t n, std::int64_t d,
               std::int64_t groups, std::int64_t* indices, float* signs) {
  constexpr std::int64_t kRows = 1024;
  const SignBits call{z, row_stride, channel_stride, d, groups, indices, signs};
  parallel_for((n + kRows - 1) / kRows, [&](std::int64_t block) {
    GEAR_DISPATCH(sign_bits_rows)(call, block * kRows, std::min(n, (block + 1) * kRows));
  });
}

}  // namespace gear::cpu
