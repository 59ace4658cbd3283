#include <algorithm>

#include "cpu/conv_rows.h"
#include "cpu/parallel.h"

namespace gear::cpu {
namespace {

// Pixels of a task: enough to reuse a chunk's weights (36 KiB, first-level cache) many times.
constexpr std::int64_t kTaskPixels = 256;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

void conv_rows_pack(const float* weight, float* packed, std::int64_t out_channels, std::int64_t in_channels, int edge) {
  const std::int64_t taps = edge * edge, chunks = ceil_div(in_channels, kConvChunk);
  const std::int64_t size = taps * kConvChunk * kConvBlock;  // one chunk of one block
  parallel_for(ceil_div(out_channels, kConvBlock) * chunks, [&](std::int64_t task) {
    const std::int64_t first_out = task / chunks * kConvBlock, first_in = task % chunks * kConvChunk;
    float* target = packed + task * size;
    std::fill_n(target, size, 0.0f);
    const std::int64_t outs = std::min(kConvBlock, out_channels - first_out);
    const std::int64_t ins = std::min(kConvChunk, in_channels - first_in);
    for (std::int64_t o = 0; o < outs; ++o) {
      const float* source = weight + ((first_out + o) * in_channels + first_in) * taps;
      for (std::int64_t i = 0; i < ins; ++i)
        for (std::int64_t tap = 0; tap < taps; ++tap)
          target[(tap * kConvChunk + i) * kConvBlock + o] = source[i * taps + tap];
    }
  });
}

void conv_rows(const float* x, const float* packed, const float* bias, float* y, std::int64_t rows,
               std::int64_t x_width, std::int64_t width, std::int64_t in_channels, std::int64_t out_channels, int edge,
               int padding) {
  const ConvRows call{x, packed, bias, y, x_width, width, in_channels, out_channels, edge, padding};
  const std::int64_t blocks = ceil_div(out_channels, kConvBlock);
  const std::int64_t height = std::max<std::int64_t>(1, kTaskPixels / width), groups = ceil_div(rows, height);
  // Neighbouring tasks read the same rows.
  parallel_for(groups * blocks, [&](std::int64_t task) {
    const std::int64_t first = task / blocks * height;
    GEAR_DISPATCH(conv_rows_tile)(call, first, std::min(rows, first + height), task % blocks);
  });
}

void winograd_rows_pack(const float* weight, float* packed, std::int64_t out_channels, std::int64_t in_channels,
                        int tile) {
  parallel_for(ceil_div(out_channels, kWinogradPanel), [&](std::int64_t panel) {
    GEAR_DISPATCH(winograd_pack_panel)(weight, packed, out_channels, in_channels, tile, panel);
  });
}

void winograd_rows(const float* x, const float* packed, const float* bias, float* y, std::int64_t rows,
                   std::int64_t x_width, std::int64_t width, std::int64_t in_channels, std::int64_t out_channels,
                   int padding, int tile) {
  const WinogradRows call{x, packed, bias, y, rows, x_width, width, in_channels, out_channels, padding, tile};
  const std::int64_t tiles = ceil_div(rows, tile) * ceil_div(width, tile);
  // Groups of tiles that are multiplied together go evenly to as few tasks as hold them, for as many threads.
  const std::int64_t groups = ceil_div(tiles, kWinogradGroup), threads = num_threads();
  const std::int64_t tasks = std::min(groups, ceil_div(ceil_div(tiles, kWinogradTiles), threads) * threads);
  parallel_for(tasks, [&](std::int64_t task) {
    const std::int64_t first = groups * task / tasks * kWinogradGroup;
    const std::int64_t last = groups * (task + 1) / tasks * kWinogradGroup;
    GEAR_DISPATCH(winograd_rows_tiles)(call, first, std::min(tiles, last));
  });
}

}  // namespace gear::cpu
