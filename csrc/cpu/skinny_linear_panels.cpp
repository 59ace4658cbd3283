// Products with packed weights (common/packing.h) without tile registers: a line of 16 columns times a broadcast group
// of x. bf16 uses the AVX-512 dot product where it is there and widens to fp32 otherwise; int8 sums exactly in int32 on
// every instruction set. Without dot products x comes widened too (Operand), so that no kernel converts it per panel.
#include "common/packing.h"
#include "cpu/simd.h"
#include "cpu/simd_int8.h"
#include "cpu/skinny_linear.h"

namespace gear::GEAR_ISA {
namespace {

// Rows at once. Six by two vectors of AVX2 leave four of its registers: two of weights, one of x and a mask.
constexpr int kBf16Rows = kLanes == 8 ? 6 : 4;
constexpr int kInt8Rows = kLanes == 8 ? 6 : 4;
constexpr int kAhead = 4096;  // bytes; hides the latency that the hardware's prefetcher leaves

// Weights to fetch meanwhile: `step` bytes for every line of the product.
struct Ahead {
  const char* weight;
  std::int64_t step;
};

template <class Bits>
inline Bits group_at(const void* x) {
  Bits bits;
  __builtin_memcpy(&bits, x, sizeof bits);
  return bits;
}

// ---- bf16
// ------------------------------------------------------------------------------------------------------------

// total += w * x.
inline void add_product(Vec w, Vec x, Vec& total) {
#ifdef GEAR_ISA_avx2
  // Spelt out: GCC 12 chooses forms of the instruction that overwrite x or w, and keeps sums in memory for want of
  // registers. The copy keeps `total`, which may be an array's element, out of memory.
  Vec sum = total;
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
  total = sum;
#else
  total = fma(w, x, total);
#endif
}

// x in fp32, already rounded to bf16: a broadcast is then one load. An accumulator's sums wait for each other, so that
// few rows take two panels abreast.
template <int kRows, int kPanels>
void bf16_panels(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, Ahead ahead, float* out) {
  constexpr int kVectors = static_cast<int>(kPanelColumns) / kLanes;
  const std::int64_t panel_bytes = lines * kLineBytes;
  Vec total[kPanels][kVectors][kRows];
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) total[p][v][r] = zero();
  for (std::int64_t line = 0; line < lines; ++line) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      const auto* at = reinterpret_cast<const bf16*>(panel + p * panel_bytes + line * kLineBytes);
      __builtin_prefetch(ahead.weight + p * panel_bytes + line * ahead.step);
      // All even k, then all odd ones, whose weights are loaded again: few registers besides the accumulators.
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        Vec w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          w[v] = i == 0 ? load_even(at + 2 * v * kLanes) : load_odd(at + 2 * v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vec value = splat(reinterpret_cast<const float*>(x + r * stride)[line * 2 + i]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) add_product(w[v], value, total[p][v][r]);
        }
        __asm__("" : "+r"(at));  // or the compiler would keep what it loaded
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVectors; ++v) store(out + r * kTileColumns + p * kPanelColumns + v * kLanes, total[p][v][r]);
}

#ifdef GEAR_ISA_avx512
template <int kRows>
__attribute__((target("avx512bf16"))) void bf16_panel_dot(const char* panel, std::int64_t lines, const char* x,
                                                          std::int64_t stride, Ahead ahead, float* out) {
  __m512 total[kRows];
  for (__m512& v : total) v = _mm512_setzero_ps();
  for (std::int64_t line = 0; line < lines; ++line) {
    __builtin_prefetch(ahead.weight + line * ahead.step);
    const __m512bh w = (__m512bh)_mm512_loadu_si512(panel + line * kLineBytes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      total[r] =
          _mm512_dpbf16_ps(total[r], (__m512bh)_mm512_set1_epi32(group_at<std::int32_t>(x + r * stride + line * 4)), w);
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out + r * kTileColumns, total[r]);
}
#endif

// ---- int8
// ------------------------------------------------------------------------------------------------------------

#if defined(GEAR_ISA_avx512) || defined(GEAR_ISA_avx2)
// kParts times four columns from `panel` on, x widened to 16 bits. Products are added in pairs: two int32 per column,
// joined at the end. Many rows take four lines a turn (a panel has a multiple of 16): with a loop's own instructions in
// every line the processor could not issue two multiplications per cycle. One or two rows wait for memory.
template <int kRows, int kParts>
inline void int8_columns(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, Ahead ahead,
                         std::int32_t* out) {
  constexpr int kTurn = kParts == 4 ? 1 : 4;
  __m256i total[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) total[r][part] = _mm256_setzero_si256();
  for (std::int64_t first = 0; first < lines; first += kTurn) {
#pragma GCC unroll 4
    for (int i = 0; i < kTurn; ++i) {
      const std::int64_t line = first + i;
      const char* p = panel + line * kLineBytes;
      if (i % (4 / kParts) == 0) __builtin_prefetch(ahead.weight + line * ahead.step);
      __m256i w[kParts];
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part)
        w[part] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + part * 16)));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256i group = _mm256_set1_epi64x(group_at<std::int64_t>(x + r * stride + line * 8));
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) add_products(w[part], group, total[r][part]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int part = 0; part < kParts; part += 2) {
      // Sums of neighbours come as columns 0 1 4 5, 2 3 6 7.
      const __m256i joined = _mm256_hadd_epi32(total[r][part], total[r][part + 1]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * kTileColumns + part * 4),
                          _mm256_permute4x64_epi64(joined, 0xd8));
    }
}

// As many accumulators as the registers hold.
template <int kRows>
void int8_panel(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, Ahead ahead,
                std::int32_t* out) {
  constexpr int kParts = kRows * 4 <= 8 ? 4 : 2;
  ahead.step /= 4 / kParts;  // a part of what is to be fetched in every pass
  for (int part = 0; part < 4; part += kParts) {
    int8_columns<kRows, kParts>(panel + part * 16, lines, x, stride, ahead, out + part * 4);
    ahead.weight += lines * ahead.step;
  }
}
#else
template <int kRows>
void int8_panel(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, Ahead, std::int32_t* out) {
  const auto* weights = reinterpret_cast<const std::int8_t*>(panel);
  for (int r = 0; r < kRows; ++r) {
    const auto* values = reinterpret_cast<const std::int16_t*>(x + r * stride);
    std::int32_t total[kPanelColumns] = {};
    for (std::int64_t line = 0; line < lines; ++line)
      for (int c = 0; c < kPanelColumns; ++c)
        for (int i = 0; i < 4; ++i) total[c] += weights[line * kLineBytes + c * 4 + i] * values[line * 4 + i];
    for (int c = 0; c < kPanelColumns; ++c) out[r * kTileColumns + c] = total[c];
  }
}
#endif

#ifdef GEAR_ISA_avx512
// VNNI multiplies unsigned by signed bytes: x + 128 goes in, 128 times the weights' sum comes off again.
template <int kRows>
__attribute__((target("avx512vnni"))) void int8_panel_dot(const char* panel, std::int64_t lines, const char* x,
                                                          std::int64_t stride, Ahead ahead, std::int32_t* out) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i total[kRows], weight_sum = _mm512_setzero_si512();
  for (__m512i& v : total) v = _mm512_setzero_si512();
  for (std::int64_t line = 0; line < lines; ++line) {
    __builtin_prefetch(ahead.weight + line * ahead.step);
    const __m512i w = _mm512_loadu_si512(panel + line * kLineBytes);
    weight_sum = _mm512_dpbusd_epi32(weight_sum, offset, w);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i group =
          _mm512_xor_si512(_mm512_set1_epi32(group_at<std::int32_t>(x + r * stride + line * 4)), offset);
      total[r] = _mm512_dpbusd_epi32(total[r], group, w);
    }
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_si512(out + r * kTileColumns, _mm512_sub_epi32(total[r], weight_sum));
}
#endif

// ---- a tile
// ----------------------------------------------------------------------------------------------------------

using PanelKernel = void (*)(const char*, std::int64_t, const char*, std::int64_t, Ahead, void*);

template <int kRows>
void run_bf16(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, Ahead ahead, void* out) {
#ifdef GEAR_ISA_avx512
  if (has_avx512_bf16()) return bf16_panel_dot<kRows>(panel, lines, x, stride, ahead, static_cast<float*>(out));
#endif
  bf16_panels<kRows, 1>(panel, lines, x, stride, ahead, static_cast<float*>(out));
}

template <int kRows>
void run_bf16_pair(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, Ahead ahead, void* out) {
  bf16_panels<kRows, 2>(panel, lines, x, stride, ahead, static_cast<float*>(out));
}

template <int kRows>
void run_int8(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, Ahead ahead, void* out) {
#ifdef GEAR_ISA_avx512
  if (has_avx512_vnni()) return int8_panel_dot<kRows>(panel, lines, x, stride, ahead, static_cast<std::int32_t*>(out));
#endif
  int8_panel<kRows>(panel, lines, x, stride, ahead, static_cast<std::int32_t*>(out));
}

constexpr PanelKernel kBf16Kernels[] = {&run_bf16<1>, &run_bf16<2>, &run_bf16<3>, &run_bf16<4>,
#if defined(GEAR_ISA_avx2)
                                        &run_bf16<5>, &run_bf16<6>
#endif
};
constexpr PanelKernel kInt8Kernels[] = {&run_int8<1>, &run_int8<2>, &run_int8<3>, &run_int8<4>,
#if defined(GEAR_ISA_avx2)
                                        &run_int8<5>, &run_int8<6>
#endif
};
// For as few rows, where two panels remain.
constexpr PanelKernel kBf16Pairs[] = {&run_bf16_pair<1>, &run_bf16_pair<2>, &run_bf16_pair<3>};
constexpr int kPairRows = sizeof kBf16Pairs / sizeof *kBf16Pairs;
static_assert(sizeof kBf16Kernels / sizeof *kBf16Kernels == kBf16Rows);
static_assert(sizeof kInt8Kernels / sizeof *kInt8Kernels == kInt8Rows);

}  // namespace

void scale_int8_products(const TileTask& task, Tile& tile) {
  for (int r = 0; r < task.n_rows; ++r) {
    const float row_scale = task.operand->row_scales[task.first_row + r];
    for (int c = 0; c < task.n_columns; ++c) {
      std::int32_t product;
      __builtin_memcpy(&product, &tile.values[r][c], 4);
      tile.values[r][c] = static_cast<float>(product) * (row_scale * task.scales[task.first_column + c]);
    }
  }
}

bool wide_panels(WeightKind kind) {
  return kind == WeightKind::bf16_panels ? !has_avx512_bf16() : kind == WeightKind::int8_panels && !has_avx512_vnni();
}

void linear_panels(const TileTask& task, Tile& tile) {
  const bool is_int8 = task.call->kind == WeightKind::int8_panels;
  const std::int64_t bytes = is_int8 ? 1 : 2;
  const std::int64_t panel_bytes = packed_panel_bytes(task.call->in_features, bytes);
  const char* weight = static_cast<const char*>(task.weight) + task.first_column / kPanelColumns * panel_bytes;
  const char* next_weight = static_cast<const char*>(task.next_weight) + task.next_column / kPanelColumns * panel_bytes;
  const char* x = static_cast<const char*>(task.operand->data) + task.first_row * task.operand->stride;
  const PanelKernel* kernels = is_int8 ? kInt8Kernels : kBf16Kernels;
  const int rows_at_once = is_int8 ? kInt8Rows : kBf16Rows;
  // Few rows, and one or two beyond full blocks, go by pairs of panels; others by blocks as equal as can be.
  const bool wide = task.operand->wide;
  const int beyond = task.n_rows % rows_at_once;
  const int paired = wide && !is_int8 && (task.n_rows <= kPairRows || beyond <= 2) ? beyond : 0;
  const int unpaired = task.n_rows - paired;
  const int n_blocks = (unpaired + rows_at_once - 1) / rows_at_once, n_parts = n_blocks + (paired > 0 ? 1 : 0);
  const std::int64_t lines = panel_bytes / kLineBytes, stride = task.operand->stride;
  for (int column = 0, n_panels; column < task.n_columns; column += n_panels * kPanelColumns) {
    const char* panel = weight + column / kPanelColumns * panel_bytes;
    n_panels = paired > 0 && column + kPanelColumns < task.n_columns ? 2 : 1;
    const char* next =
        column + n_panels * kPanelColumns < task.n_columns ? panel + n_panels * panel_bytes : next_weight;
    // The next panels are fetched meanwhile, a part by every block of rows: the first block would wait for memory while
    // the others ask nothing of it. Dot products keep a fixed distance.
    const auto ahead = [&](int p, int part) {
      if (!wide) return Ahead{panel + kAhead, kLineBytes};
      const std::int64_t step = kLineBytes / n_parts;
      return Ahead{next + p * panel_bytes + part * lines * step, step};
    };
    for (int p = 0; p < n_panels; ++p)
      for (int block = 0, r = 0, n; block < n_blocks; ++block, r += n) {
        n = (unpaired - r) / (n_blocks - block);
        kernels[n - 1](panel + p * panel_bytes, lines, x + r * stride, stride, ahead(p, block),
                       &tile.values[r][column + p * kPanelColumns]);
      }
    if (paired > 0)
      (n_panels == 2 ? kBf16Pairs : kBf16Kernels)[paired - 1](panel, lines, x + unpaired * stride, stride,
                                                              ahead(0, n_blocks), &tile.values[unpaired][column]);
  }
  if (is_int8) scale_int8_products(task, tile);
}

}  // namespace gear::GEAR_ISA
