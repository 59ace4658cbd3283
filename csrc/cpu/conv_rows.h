// fp32 convolution of channels-last rows in short sums: 16 input channels of the kernel at a time, or by Winograd.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gear {

constexpr std::int64_t kConvChunk = 16;  // input channels whose products are added up in one go
constexpr std::int64_t kConvBlock = 64;  // output channels that a task computes

// One strip of an image, channels last. x has `edge` - 1 rows more than y; columns outside of x count as zeros.
struct ConvRows {
  const float* x;       // [rows + edge - 1, x_width, in_channels]
  const float* weight;  // as conv_rows_pack leaves it: [out / 64, in / 16, edge, edge, 16, 64], zeros at the ends
  const float* bias;    // [out_channels] or null
  float* y;             // [rows, width, out_channels]
  std::int64_t x_width, width, in_channels, out_channels;
  int edge;     // 1, 2 or 3
  int padding;  // columns of zeros at the left
};

constexpr std::int64_t kWinogradTiles = 24;  // most tiles of a task
constexpr std::int64_t kWinogradGroup = 12;  // tiles that any instruction set multiplies without a rest
constexpr std::int64_t kWinogradPanel = 32;  // output channels of a panel of weights

// As ConvRows, in tiles of tile x tile outputs: 2 or 4 for 3 x 3 kernels, 5 for 2 x 2; see conv_rows_winograd.cpp.
// `weight`: [winograd_frequencies, out / 32, depth, 32], zeros at the ends.
struct WinogradRows {
  const float *x, *weight, *bias;
  float* y;
  std::int64_t rows, x_width, width, in_channels, out_channels;
  int padding, tile;
};

constexpr std::int64_t winograd_edge(std::int64_t tile) { return tile == 5 ? 2 : 3; }
constexpr std::int64_t winograd_frequencies(std::int64_t tile) {
  return (tile + winograd_edge(tile) - 1) * (tile + winograd_edge(tile) - 1);
}

// Input channels, padded.
constexpr std::int64_t winograd_depth(std::int64_t in_channels) { return (in_channels + 15) / 16 * 16; }

}  // namespace gear

// Tiles [first, last), at most kWinogradTiles, counted along the rows of tiles.
GEAR_DECLARE_ISA(void, winograd_rows_tiles, (const gear::WinogradRows& call, std::int64_t first, std::int64_t last))
GEAR_DECLARE_ISA(void, winograd_pack_panel,
                 (const float* weight, float* packed, std::int64_t out_channels, std::int64_t in_channels, int tile,
                  std::int64_t panel))

GEAR_DECLARE_ISA(void, conv_rows_tile,
                 (const ConvRows& call, std::int64_t first_row, std::int64_t last_row, std::int64_t block))

namespace gear::cpu {

// weight [out, in, edge, edge] -> packed; `packed` has room for the rounded numbers of channels.
void conv_rows_pack(const float* weight, float* packed, std::int64_t out_channels, std::int64_t in_channels, int edge);

void conv_rows(const float* x, const float* packed, const float* bias, float* y, std::int64_t rows,
               std::int64_t x_width, std::int64_t width, std::int64_t in_channels, std::int64_t out_channels, int edge,
               int padding);

// weight [out, in, edge, edge] -> the spectra that WinogradRows describes; tile is 2 or 4 (edge 3) or 5 (edge 2).
void winograd_rows_pack(const float* weight, float* packed, std::int64_t out_channels, std::int64_t in_channels,
                        int tile);

void winograd_rows(const float* x, const float* packed, const float* bias, float* y, std::int64_t rows,
                   std::int64_t x_width, std::int64_t width, std::int64_t in_channels, std::int64_t out_channels,
                   int padding, int tile);

}  // namespace gear::cpu
