// One pass over the latent; bytes are all that it costs. See the header.
#include "cpu/sign_bits.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace gear::cpu {

void sign_bits(const float* z, int64_t row_stride, int64_t channel_stride, int64_t n, int64_t d, int64_t groups,
               int64_t* indices, float* signs) {
  constexpr int64_t kRows = 1024;
  const int64_t width = d / groups;
  parallel_for((n + kRows - 1) / kRows, [=](int64_t block) noexcept {
    for (int64_t row = block * kRows; row < std::min(n, (block + 1) * kRows); ++row) {
      for (int64_t group = 0; group < groups; ++group) {
        const float* channel = z + row * row_stride + group * width * channel_stride;
        float* sign = signs + row * d + group * width;
        uint64_t bits = 0;
        for (int64_t i = 0; i < width; ++i) {
          const bool positive = channel[i * channel_stride] > 0;
          bits |= static_cast<uint64_t>(positive) << i;
          sign[i] = positive ? 1.0f : -1.0f;
        }
        indices[row * groups + group] = static_cast<int64_t>(bits);
      }
    }
  });
}

}  // namespace gear::cpu
