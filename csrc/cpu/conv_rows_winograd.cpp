// conv_rows by Winograd's minimal filtering F(m x m, r x r) (Lavin and Gray, CVPR 2016): 4 or 2.25 products per output
// and input channel in place of 9 for m = 2 or 4 and r = 3, 1.44 in place of 4 for m = 5 and r = 2.
//
//     Y = A^T [ sum over channels (G g G^T) * (B^T d B) ] A          d: a tile of n^2 pixels, n = m + r - 1, stride m
//
// Matrices are those of Cook and Toom for the points 0, 1, -1, infinity (n = 4) and 0, 5/8, -5/8, 3/2, -3/2, infinity
// (n = 6; B depends on n only). The latter's constants are exact in fp32, their error for m = 4 is less than half of
// that for 0, 1, -1, 2, -2 (1.0e-6 against 2.3e-6 over 128 channels; 1.5e-6 for 0, 1, -1, 1/2, -2, which Barabasz et
// al., TOMS 2020, chose), and a pair p, -p shares its even and odd parts. Tiles are counted from row 0 and column 0 of
// the output.
// A task takes at most kTiles of them: their spectra lie in its scratch memory as [n^2][tile][channel], each is
// multiplied with the weight's spectrum in registers, 64 output channels at a time, and turned back. At most kDepth
// products are added up before they join a sum, so the error does not grow with the number of channels. A pixel's bits
// depend on its tile's neighbourhood only.
#include "cpu/conv_rows.h"
#include "cpu/simd.h"
#include "cpu/skinny_linear.h"  // scratch

namespace gear::GEAR_ISA {
namespace {

constexpr int kRows = kRegisters == 32 ? 12 : 6, kVecs = 2;  // tiles x vectors of output channels in registers
constexpr int kTiles = static_cast<int>(kWinogradTiles), kPanel = static_cast<int>(kWinogradPanel);
constexpr int kBlock = static_cast<int>(kConvBlock);
constexpr std::int64_t kDepth = 128;
static_assert(kTiles % kRows == 0 && kPanel % (kVecs * kLanes) == 0 && kBlock % kPanel == 0);

// ---- transforms of one line
// ------------------------------------------------------------------------------------------

// v = B^T d.
inline void transform_input(const Vec (&d)[4], Vec (&v)[4]) {
  v[0] = sub(d[0], d[2]);
  v[1] = add(d[1], d[2]);
  v[2] = sub(d[2], d[1]);
  v[3] = sub(d[1], d[3]);
}

// The points +-a and +-b of n = 6. Every product below is exact in fp32.
constexpr double kA = 0.625, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;

inline Vec constant(double value) { return splat(static_cast<float>(value)); }

inline void transform_input(const Vec (&d)[6], Vec (&v)[6]) {
  const Vec a2 = constant(-kA2), b2 = constant(-kB2), sum = constant(-(kA2 + kB2)), product = constant(kA2 * kB2);
  v[0] = fma(product, d[0], fma(sum, d[2], d[4]));
  v[5] = fma(product, d[1], fma(sum, d[3], d[5]));
  const Vec even_a = fma(b2, d[2], d[4]), odd_a = mul(constant(kA), fma(b2, d[1], d[3]));
  const Vec even_b = fma(a2, d[2], d[4]), odd_b = mul(constant(kB), fma(a2, d[1], d[3]));
  v[1] = add(even_a, odd_a);
  v[2] = sub(even_a, odd_a);
  v[3] = add(even_b, odd_b);
  v[4] = sub(even_b, odd_b);
}

// y = A^T m.
inline void transform_output(const Vec (&m)[4], Vec (&y)[2]) {
  y[0] = add(add(m[0], m[1]), m[2]);
  y[1] = sub(sub(m[1], m[2]), m[3]);
}

template <int kM>
void transform_output(const Vec (&m)[6], Vec (&y)[kM]) {
  const Vec even_a = add(m[1], m[2]), odd_a = sub(m[1], m[2]);
  const Vec even_b = add(m[3], m[4]), odd_b = sub(m[3], m[4]);
  y[0] = add(add(m[0], even_a), even_b);
  y[1] = fma(constant(kA), odd_a, mul(constant(kB), odd_b));
  y[2] = fma(constant(kA2), even_a, mul(constant(kB2), even_b));
  y[3] = fma(constant(kA2 * kA), odd_a, mul(constant(kB2 * kB), odd_b));
  if constexpr (kM == 5) y[4] = fma(constant(kA2 * kA2), even_a, mul(constant(kB2 * kB2), even_b));
  y[kM - 1] = add(y[kM - 1], m[5]);
}

// ---- tiles
// ----------------------------------------------------------------------------------------------------------

// What a task works on: tiles [first, first + count), counted along the rows of tiles.
struct Tiles {
  const WinogradRows& call;
  std::int64_t first, count, across;  // across: tiles in a row
  std::int64_t depth;                 // padded number of input channels
  float* spectra;                     // [n^2][kTiles][depth]
  float* products;                    // [n^2][kTiles][kBlock]
};

// spectra = B^T d B of one tile; pixels outside of x are zeros.
template <int kN, int kM>
void transform_tile(const Tiles& tiles, std::int64_t tile) {
  const WinogradRows& call = tiles.call;
  const std::int64_t row = (tiles.first + tile) / tiles.across * kM;
  const std::int64_t column = (tiles.first + tile) % tiles.across * kM - call.padding;
  const std::int64_t channels = call.in_channels, plane = kTiles * tiles.depth;
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    const int rest = channels - c < kLanes ? static_cast<int>(channels - c) : kLanes;
    Vec lines[kN][kN];  // [column][row of the spectrum]
#pragma GCC unroll 6
    for (int j = 0; j < kN; ++j) {
      Vec d[kN];
#pragma GCC unroll 6
      for (int i = 0; i < kN; ++i) {
        const std::int64_t y = row + i, x = column + j;
        const bool inside = y < call.rows + kN - kM && x >= 0 && x < call.x_width;
        const float* at = call.x + (y * call.x_width + x) * channels + c;
        d[i] = !inside ? zero() : rest == kLanes ? load(at) : load_first(at, rest);
      }
      transform_input(d, lines[j]);
    }
    float* out = tiles.spectra + tile * tiles.depth + c;
#pragma GCC unroll 6
    for (int i = 0; i < kN; ++i) {
      Vec d[kN], v[kN];
#pragma GCC unroll 6
      for (int j = 0; j < kN; ++j) d[j] = lines[j][i];
      transform_input(d, v);
#pragma GCC unroll 6
      for (int j = 0; j < kN; ++j) store(out + (i * kN + j) * plane, v[j]);
    }
  }
}

// out[t][0 ... kUsed vectors) (+)= sum over [0, depth) of x[t][c] * weight[c][...] for kRows tiles.
template <int kUsed>
inline void multiply(const float* x, std::int64_t x_stride, const float* weight, std::int64_t depth, bool first,
                     float* out) {
  Vec sums[kRows][kUsed];
#pragma GCC unroll 12
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) sums[t][v] = zero();
  for (std::int64_t c = 0; c < depth; ++c, weight += kPanel) {
    Vec w[kUsed];
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 12
    for (int t = 0; t < kRows; ++t) {
      const Vec value = splat(x[t * x_stride + c]);
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) sums[t][v] = fma(value, w[v], sums[t][v]);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) {
      float* at = out + t * kBlock + v * kLanes;
      store(at, first ? sums[t][v] : add(load(at), sums[t][v]));
    }
}

// products of all frequencies for output channels [channel, channel + used).
void multiply_block(const Tiles& tiles, int frequencies, std::int64_t channel, std::int64_t used) {
  constexpr int kWidth = kVecs * kLanes;
  const std::int64_t panels = (tiles.call.out_channels + kPanel - 1) / kPanel, depth = tiles.depth;
  const std::int64_t parts = (depth + kDepth - 1) / kDepth, columns = (used + kWidth - 1) / kWidth;
  const std::int64_t pieces = frequencies * columns * parts, groups = (tiles.count + kRows - 1) / kRows;
  // Piece of the weight: kDepth channels of one frequency and kWidth output channels.
  const auto piece_at = [&](std::int64_t piece) {
    const std::int64_t out = channel + piece / parts % columns * kWidth, f = piece / parts / columns;
    return tiles.call.weight + ((f * panels + out / kPanel) * depth + piece % parts * kDepth) * kPanel + out % kPanel;
  };
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    const std::int64_t from = piece % parts * kDepth, out = piece / parts % columns * kWidth;
    const std::int64_t f = piece / parts / columns, part = depth - from < kDepth ? depth - from : kDepth;
    const float *weight = piece_at(piece), *next = piece_at(piece + 1 < pieces ? piece + 1 : piece);
    for (std::int64_t group = 0; group < groups; ++group) {
      // The weight is read once per task, from far away: a part of the next piece is fetched with every group.
      for (std::int64_t c = kDepth * group / groups; c < kDepth * (group + 1) / groups; ++c)
        __builtin_prefetch(next + c * kPanel);
      float* products = tiles.products + (f * kTiles + group * kRows) * kBlock + out;
      const float* x = tiles.spectra + (f * kTiles + group * kRows) * depth + from;
      used - out > kLanes ? multiply<kVecs>(x, depth, weight, part, from == 0, products)
                          : multiply<1>(x, depth, weight, part, from == 0, products);
    }
  }
}

// y = A^T products A + bias for one tile.
template <int kN, int kM>
void finish_tile(const Tiles& tiles, std::int64_t tile, std::int64_t channel, std::int64_t used) {
  const WinogradRows& call = tiles.call;
  const std::int64_t row = (tiles.first + tile) / tiles.across * kM;
  const std::int64_t column = (tiles.first + tile) % tiles.across * kM;
  const std::int64_t height = call.rows - row < kM ? call.rows - row : kM;
  const std::int64_t width = call.width - column < kM ? call.width - column : kM;
  for (std::int64_t c = 0; c < used; c += kLanes) {
    const int rest = used - c < kLanes ? static_cast<int>(used - c) : kLanes;
    Vec lines[kN][kM];  // [column of the spectrum][row]
#pragma GCC unroll 6
    for (int j = 0; j < kN; ++j) {
      Vec m[kN];
#pragma GCC unroll 6
      for (int i = 0; i < kN; ++i) m[i] = load(tiles.products + ((i * kN + j) * kTiles + tile) * kBlock + c);
      transform_output(m, lines[j]);
    }
    const float* bias = call.bias == nullptr ? nullptr : call.bias + channel + c;
    const Vec base = bias == nullptr ? zero() : rest == kLanes ? load(bias) : load_first(bias, rest);
    for (int i = 0; i < height; ++i) {
      Vec m[kN], y[kM];
#pragma GCC unroll 6
      for (int j = 0; j < kN; ++j) m[j] = lines[j][i];
      transform_output(m, y);
      float* to = call.y + ((row + i) * call.width + column) * call.out_channels + channel + c;
      for (int j = 0; j < width; ++j, to += call.out_channels) {
        float lanes[kLanes];
        store(rest == kLanes ? to : lanes, add(base, y[j]));
        for (int l = 0; rest < kLanes && l < rest; ++l) to[l] = lanes[l];
      }
    }
  }
}

template <int kN, int kM>
void run_tiles(const Tiles& tiles) {
  constexpr int kFrequencies = kN * kN;
  // Channels and tiles behind the last ones are multiplied too: they are zeros.
  if (tiles.depth != tiles.call.in_channels || tiles.count % kRows != 0)
    __builtin_memset(tiles.spectra, 0, static_cast<std::size_t>(kFrequencies * kTiles * tiles.depth) * sizeof(float));
  for (std::int64_t tile = 0; tile < tiles.count; ++tile) transform_tile<kN, kM>(tiles, tile);
  for (std::int64_t channel = 0; channel < tiles.call.out_channels; channel += kBlock) {
    const std::int64_t left = tiles.call.out_channels - channel, used = left < kBlock ? left : kBlock;
    multiply_block(tiles, kFrequencies, channel, used);
    for (std::int64_t tile = 0; tile < tiles.count; ++tile) finish_tile<kN, kM>(tiles, tile, channel, used);
  }
}

// Output channels whose kernels are transformed together; compilers split it where registers are shorter.
constexpr int kDoubles = 4;
typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double))));
typedef float Floats __attribute__((vector_size(kDoubles * sizeof(float))));

// Input channels whose spectra are collected: frequencies lie a power of two apart and share a few sets of the caches,
// so each gets a kilobyte at a time.
constexpr int kPackChannels = 8;

// u = G g: rows (1, q, q^2) / product of (q - other points) for the points q = 0, p, -p, ... and (0, ..., 1) for
// infinity.
template <int kN, int kR>
inline void transform_kernel(const Doubles (&g)[kR], Doubles (&u)[kN]) {
  constexpr double kZero = kN == 4 ? 1 : 1 / (kA2 * kB2);
  constexpr double kPoints[2] = {kN == 4 ? 1 : kA, kB};
  constexpr double kScales[2] = {kN == 4 ? 0.5 : 1 / (2 * kA2 * (kA2 - kB2)), 1 / (2 * kB2 * (kB2 - kA2))};
  u[0] = kZero * g[0];
#pragma GCC unroll 2
  for (int pair = 0; pair < kN / 2 - 1; ++pair) {
    const double p = kPoints[pair], scale = kScales[pair];
    Doubles even = scale * g[0];
    if constexpr (kR == 3) even += scale * p * p * g[2];
    const Doubles odd = scale * p * g[1];
    u[1 + 2 * pair] = even + odd;
    u[2 + 2 * pair] = even - odd;
  }
  u[kN - 1] = g[kR - 1];
}

// spectra[i][j] = (G g G^T)[i][j] of one input channel's r x r kernels, in double; kernels: [r^2][kPanel], spectra:
// [n^2][kPackChannels][kPanel].
template <int kN, int kR>
void transform_kernels(const float (&kernels)[9][kPanel], float* spectra) {
  for (int o = 0; o < kPanel; o += kDoubles) {
    Doubles columns[kR][kN];
#pragma GCC unroll 3
    for (int b = 0; b < kR; ++b) {
      Doubles g[kR];
#pragma GCC unroll 3
      for (int a = 0; a < kR; ++a) {
        Floats narrow;
        __builtin_memcpy(&narrow, &kernels[a * kR + b][o], sizeof narrow);
        g[a] = __builtin_convertvector(narrow, Doubles);
      }
      transform_kernel(g, columns[b]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kN; ++i) {
      Doubles g[kR], u[kN];
#pragma GCC unroll 3
      for (int b = 0; b < kR; ++b) g[b] = columns[b][i];
      transform_kernel(g, u);
#pragma GCC unroll 6
      for (int j = 0; j < kN; ++j) {
        const Floats spectrum = __builtin_convertvector(u[j], Floats);
        __builtin_memcpy(spectra + (i * kN + j) * kPackChannels * kPanel + o, &spectrum, sizeof spectrum);
      }
    }
  }
}

}  // namespace

void winograd_rows_tiles(const WinogradRows& call, std::int64_t first, std::int64_t last) {
  const std::int64_t depth = winograd_depth(call.in_channels), frequencies = winograd_frequencies(call.tile);
  float* memory = static_cast<float*>(
      scratch(Scratch::convolution, static_cast<std::size_t>(frequencies * kTiles * (depth + kBlock)) * sizeof(float)));
  const std::int64_t across = (call.width + call.tile - 1) / call.tile;
  const Tiles tiles{call, first, last - first, across, depth, memory, memory + frequencies * kTiles * depth};
  call.tile == 5 ? run_tiles<6, 5>(tiles) : call.tile == 4 ? run_tiles<6, 4>(tiles) : run_tiles<4, 2>(tiles);
}

void winograd_pack_panel(const float* weight, float* packed, std::int64_t out_channels, std::int64_t in_channels,
                         int tile, std::int64_t panel) {
  const std::int64_t depth = winograd_depth(in_channels), panels = (out_channels + kPanel - 1) / kPanel;
  const std::int64_t stride = panels * depth * kPanel, taps = winograd_edge(tile) * winograd_edge(tile);
  alignas(64) float spectra[36 * kPackChannels * kPanel];
  for (std::int64_t first = 0; first < depth; first += kPackChannels) {
    for (std::int64_t c = first; c < first + kPackChannels; ++c) {
      float kernels[9][kPanel];
      for (std::int64_t o = 0; o < kPanel; ++o) {
        const std::int64_t out = panel * kPanel + o;
        const bool real = out < out_channels && c < in_channels;
        for (std::int64_t tap = 0; tap < taps; ++tap)
          kernels[tap][o] = real ? weight[(out * in_channels + c) * taps + tap] : 0.0f;
      }
      float* to = spectra + (c - first) * kPanel;
      tile == 5   ? transform_kernels<6, 2>(kernels, to)
      : tile == 4 ? transform_kernels<6, 3>(kernels, to)
                  : transform_kernels<4, 3>(kernels, to);
    }
    for (std::int64_t f = 0; f < winograd_frequencies(tile); ++f)
      __builtin_memcpy(packed + f * stride + (panel * depth + first) * kPanel, spectra + f * kPackChannels * kPanel,
                       kPackChannels * kPanel * sizeof(float));
  }
}

}  // namespace gear::GEAR_ISA
