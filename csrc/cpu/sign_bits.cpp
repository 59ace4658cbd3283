// One pass over the latent; bytes are all that it costs. See the header.
#include "cpu/sign_bits.h"

#include "cpu/simd.h"

namespace gear::GEAR_ISA {
namespace {

constexpr std::int64_t kWord = 64;         // bits that are collected
constexpr std::int64_t kGathered = 2 * 8;  // rows of a strided latent that are gathered

// Signs of `width` <= kWord channels; bit i of the result: channel i is > 0.
inline std::uint64_t pack(const float* channels, std::int64_t width, float* signs) {
  std::uint64_t bits = 0;
  Vec sign;
  if (width < kLanes) {
    float lanes[kLanes];
    bits = positive_bits(load_first(channels, static_cast<int>(width)), sign);
    store(lanes, sign);
    for (std::int64_t i = 0; i < width; ++i) signs[i] = lanes[i];
    return bits;
  }
  for (std::int64_t i = 0; i < width; i += kLanes) {
    // The last vector overlaps the one before it: the same bits twice.
    const std::int64_t at = i + kLanes <= width ? i : width - kLanes;
    bits |= static_cast<std::uint64_t>(positive_bits(load(channels + at), sign)) << at;
    store(signs + at, sign);
  }
  return bits;
}

// `span` channels of one row, cut into indices of `width` bits.
inline void put(const float* channels, std::int64_t span, std::int64_t width, float* signs, std::int64_t* indices) {
  const std::uint64_t bits = pack(channels, span, signs), mask = (std::uint64_t{1} << width) - 1;
  for (std::int64_t at = 0; at < span; at += width) *indices++ = static_cast<std::int64_t>(bits >> at & mask);
}

}  // namespace

void sign_bits_rows(const SignBits& call, std::int64_t first, std::int64_t last) {
  const std::int64_t d = call.channels, width = d / call.groups;
  const std::int64_t span = d <= kWord ? d : width;  // groups of a row that one word holds
  for (std::int64_t channel = 0; channel < d; channel += span) {
    const float* z = call.z + channel * call.channel_stride;
    float* signs = call.signs + channel;
    std::int64_t* indices = call.indices + channel / width;
    if (call.channel_stride == 1) {
      for (std::int64_t row = first; row < last; ++row)
        put(z + row * call.row_stride, span, width, signs + row * d, indices + row * call.groups);
      continue;
    }
    // Channels of an image lie apart, its rows side by side: these are walked first.
    for (std::int64_t row = first; row < last; row += kGathered) {
      const std::int64_t rows = last - row < kGathered ? last - row : kGathered;
      float gathered[kGathered][kWord];
      for (std::int64_t i = 0; i < span; ++i)
        for (std::int64_t r = 0; r < rows; ++r)
          gathered[r][i] = z[(row + r) * call.row_stride + i * call.channel_stride];
      for (std::int64_t r = 0; r < rows; ++r)
        put(gathered[r], span, width, signs + (row + r) * d, indices + (row + r) * call.groups);
    }
  }
}

}  // namespace gear::GEAR_ISA
