// Direct convolution, fp32: a tile of kPixels pixels x 64 output channels, the kernel's taps and 16 input channels at a
// time. Every such sum of edge^2 * 16 products starts at zero and is then added to the output, so that the error grows
// with the number of chunks and not with the number of products.
//
// The pixels' neighbourhood is copied first: constant strides, and zeros where the image or its channels end. A pixel's
// bits depend on its neighbourhood only, not on tiles, strips or threads.
#include "cpu/conv_rows.h"

#include "cpu/simd.h"

namespace gear::GEAR_ISA {
namespace {

// The accumulators of a tile fill the registers but for the weights and one pixel's value.
constexpr int kPixels = 6;
constexpr int kVecs = kRegisters == 32 ? 4 : 2;
constexpr int kBlock = static_cast<int>(kConvBlock), kChunk = static_cast<int>(kConvChunk);

// Rows first_row .. of x, columns `column` .. column + kPixels + edge - 2, channels `channel` ..; zeros outside.
template <int kEdge>
void copy_patch(const ConvRows& call, std::int64_t first_row, std::int64_t column, std::int64_t channel, float* patch) {
  const std::int64_t channels = call.in_channels - channel < kChunk ? call.in_channels - channel : kChunk;
  for (int row = 0; row < kEdge; ++row) {
    for (int i = 0; i < kPixels + kEdge - 1; ++i, patch += kChunk) {
      const std::int64_t at = column + i;
      const bool inside = at >= 0 && at < call.x_width;
      const float* source =
          call.x + ((first_row + row) * call.x_width + (inside ? at : 0)) * call.in_channels + channel;
      if (inside && channels == kChunk) {
        for (int c = 0; c < kChunk; c += kLanes) store(patch + c, load(source + c));
      } else {
        for (int c = 0; c < kChunk; ++c) patch[c] = inside && c < channels ? source[c] : 0.0f;
      }
    }
  }
}

// sums[p][v] = products of the patch with the weights of one chunk, kUsed vectors of output channels.
template <int kEdge, int kUsed>
inline void multiply(const float* patch, const float* weight, Vec (&sums)[kPixels][kUsed]) {
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) sums[p][v] = zero();
  for (int row = 0; row < kEdge; ++row) {
    for (int tap = 0; tap < kEdge; ++tap) {
      const float* x = patch + (row * (kPixels + kEdge - 1) + tap) * kChunk;
      for (int c = 0; c < kChunk; ++c, ++x, weight += kBlock) {
        Vec w[kUsed];
#pragma GCC unroll 4
        for (int v = 0; v < kUsed; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) {
          const Vec value = splat(x[p * kChunk]);
#pragma GCC unroll 4
          for (int v = 0; v < kUsed; ++v) sums[p][v] = fma(value, w[v], sums[p][v]);
        }
      }
    }
  }
}

// y (+)= sums; `first`: y = bias + sums. Whole tiles only.
template <int kUsed>
inline void put(const Vec (&sums)[kPixels][kUsed], float* y, std::int64_t stride, const float* bias, bool first) {
  for (int p = 0; p < kPixels; ++p, y += stride) {
    for (int v = 0; v < kUsed; ++v) {
      const Vec base = !first ? load(y + v * kLanes) : bias == nullptr ? zero() : load(bias + v * kLanes);
      store(y + v * kLanes, add(base, sums[p][v]));
    }
  }
}

// As put, for tiles that stick out of the image or of its channels.
template <int kUsed>
inline void put_part(const Vec (&sums)[kPixels][kUsed], float* y, std::int64_t stride, const float* bias, bool first,
                     std::int64_t pixels, std::int64_t channels) {
  float lanes[kUsed * kLanes];
  for (std::int64_t p = 0; p < pixels; ++p) {
    for (int v = 0; v < kUsed; ++v) store(lanes + v * kLanes, sums[p][v]);
    for (std::int64_t c = 0; c < channels; ++c) {
      const float base = !first ? y[p * stride + c] : bias == nullptr ? 0.0f : bias[c];
      y[p * stride + c] = base + lanes[c];
    }
  }
}

// Where a tile goes and how much of it is wanted.
struct Target {
  float* y;
  const float* bias;
  std::int64_t stride, pixels, channels;
  bool first;
};

template <int kEdge, int kUsed>
inline void compute(const float* patch, const float* weight, const Target& to) {
  Vec sums[kPixels][kUsed];
  multiply<kEdge>(patch, weight, sums);
  if (to.pixels == kPixels && to.channels >= kUsed * kLanes)
    put(sums, to.y, to.stride, to.bias, to.first);
  else
    put_part(sums, to.y, to.stride, to.bias, to.first, to.pixels,
             to.channels < kUsed * kLanes ? to.channels : kUsed * kLanes);
}

template <int kEdge>
void tile(const ConvRows& call, std::int64_t first_row, std::int64_t last_row, std::int64_t block) {
  constexpr int kSize = kEdge * kEdge * kChunk * kBlock;
  const std::int64_t chunks = (call.in_channels + kChunk - 1) / kChunk;
  const std::int64_t channels =
      call.out_channels - block * kBlock < kBlock ? call.out_channels - block * kBlock : kBlock;
  alignas(64) float patch[kEdge * (kPixels + kEdge - 1) * kChunk];
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* weight = call.weight + (block * chunks + chunk) * kSize;
    for (std::int64_t row = first_row; row < last_row; ++row) {
      for (std::int64_t column = 0; column < call.width; column += kPixels) {
        copy_patch<kEdge>(call, row, column - call.padding, chunk * kChunk, patch);
        const std::int64_t pixels = call.width - column < kPixels ? call.width - column : kPixels;
        for (std::int64_t out = 0; out < channels; out += kVecs * kLanes) {
          const std::int64_t channel = block * kBlock + out;
          const Target to{call.y + (row * call.width + column) * call.out_channels + channel,
                          call.bias == nullptr ? nullptr : call.bias + channel,
                          call.out_channels,
                          pixels,
                          channels - out,
                          chunk == 0};
          // The last convolution has three output channels.
          channels - out > kLanes ? compute<kEdge, kVecs>(patch, weight + out, to)
                                  : compute<kEdge, 1>(patch, weight + out, to);
        }
      }
    }
  }
}

}  // namespace

void conv_rows_tile(const ConvRows& call, std::int64_t first_row, std::int64_t last_row, std::int64_t block) {
  call.edge == 3   ? tile<3>(call, first_row, last_row, block)
  : call.edge == 2 ? tile<2>(call, first_row, last_row, block)
                   : tile<1>(call, first_row, last_row, block);
}

}  // namespace gear::GEAR_ISA
