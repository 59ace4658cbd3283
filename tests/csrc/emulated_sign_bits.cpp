// sign_bits: strided input, several groups, zeros and NaN.
#include "cuda/sign_bits.h"

#include <cmath>

#include "device.h"
#include "emulated.h"

namespace {

using gear::emulated::check;
using gear::emulated::Device;
using gear::emulated::normal;

void signs_of(std::int64_t n, std::int64_t d, std::int64_t groups, bool channels_first) {
  std::vector<float> values = normal(static_cast<std::size_t>(n * d), 7);
  values[0] = 0.0f;
  values[1] = -0.0f;
  values[2] = std::nanf("");
  const std::int64_t row_stride = channels_first ? 1 : d, channel_stride = channels_first ? n : 1, width = d / groups;
  const Device<float> z(values), signs(values.size());
  const Device<std::int64_t> indices(static_cast<std::size_t>(n * groups));
  gear::cuda::sign_bits(z.data(), row_stride, channel_stride, n, d, groups, indices.data(), signs.data(), nullptr);
  const std::vector<float> found = signs.values();
  const std::vector<std::int64_t> index = indices.values();
  for (std::int64_t row = 0; row < n; ++row) {
    for (std::int64_t channel = 0; channel < d; ++channel) {
      const bool positive = values[row * row_stride + channel * channel_stride] > 0.0f;
      check(found[row * d + channel] == (positive ? 1.0f : -1.0f), "sign");
      check((index[row * groups + channel / width] >> (channel % width) & 1) == positive, "bit");
      check(index[row * groups + channel / width] >> width == 0, "no other bit");
    }
  }
}

}  // namespace

GEAR_CASE(sign_bits) {
  signs_of(300, 14, 1, true);
  signs_of(70, 32, 4, false);
  signs_of(3, 62, 1, false);
}
