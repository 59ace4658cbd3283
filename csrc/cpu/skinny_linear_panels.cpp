// Products with packed weights (common/packing.h) without tile registers: a line of 16 columns times a broadcast group
// of x. bf16 uses the AVX-512 dot product where it is there and widens to fp32 otherwise; int8 sums exactly in int32 on
// every instruction set.
#include "common/packing.h"
#include "cpu/simd.h"
#include "cpu/skinny_linear.h"

namespace gear::GEAR_ISA {
namespace {

constexpr int kRowsAtOnce = 4;
constexpr int kAhead = 2048;  // bytes; hides the latency that the hardware's prefetcher leaves

inline std::int32_t group_at(const void* x) {
  std::int32_t bits;
  __builtin_memcpy(&bits, x, 4);
  return bits;
}

// ---- bf16
// ------------------------------------------------------------------------------------------------------------

template <int kRows>
void bf16_panel(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, float* out) {
  constexpr int kVectors = static_cast<int>(kPanelColumns) / kLanes;
  Vec total[kRows][kVectors];
  for (auto& row : total)
    for (Vec& v : row) v = zero();
  for (std::int64_t line = 0; line < lines; ++line) {
    __builtin_prefetch(panel + line * kLineBytes + kAhead);
    const bf16* w = reinterpret_cast<const bf16*>(panel + line * kLineBytes);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec even, odd;
      load_pairs(w + 2 * v * kLanes, even, odd);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const bf16* pair = reinterpret_cast<const bf16*>(x + r * stride + line * 4);
        total[r][v] = fma(even, splat(to_float(pair[0])), total[r][v]);
        total[r][v] = fma(odd, splat(to_float(pair[1])), total[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * kTileColumns + v * kLanes, total[r][v]);
}

#ifdef GEAR_ISA_avx512
template <int kRows>
__attribute__((target("avx512bf16"))) void bf16_panel_dot(const char* panel, std::int64_t lines, const char* x,
                                                          std::int64_t stride, float* out) {
  __m512 total[kRows];
  for (__m512& v : total) v = _mm512_setzero_ps();
  for (std::int64_t line = 0; line < lines; ++line) {
    __builtin_prefetch(panel + line * kLineBytes + kAhead);
    const __m512bh w = (__m512bh)_mm512_loadu_si512(panel + line * kLineBytes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      total[r] = _mm512_dpbf16_ps(total[r], (__m512bh)_mm512_set1_epi32(group_at(x + r * stride + line * 4)), w);
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out + r * kTileColumns, total[r]);
}
#endif

// ---- int8
// ------------------------------------------------------------------------------------------------------------

#if defined(GEAR_ISA_avx512) || defined(GEAR_ISA_avx2)
// 16-bit products are added in pairs: two int32 per column, joined at the end.
template <int kRows>
void int8_panel(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, std::int32_t* out) {
  for (int part = 0; part < 4; ++part) {
    __m256i total[kRows];
    for (__m256i& v : total) v = _mm256_setzero_si256();
    for (std::int64_t line = 0; line < lines; ++line) {
      const char* p = panel + line * kLineBytes + part * 16;
      __builtin_prefetch(p + kAhead);
      const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m128i group = _mm_set1_epi32(group_at(x + r * stride + line * 4));
        total[r] = _mm256_add_epi32(total[r], _mm256_madd_epi16(w, _mm256_cvtepi8_epi16(group)));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      alignas(32) std::int32_t pairs[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), total[r]);
      for (int c = 0; c < 4; ++c) out[r * kTileColumns + part * 4 + c] = pairs[2 * c] + pairs[2 * c + 1];
    }
  }
}
#else
template <int kRows>
void int8_panel(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, std::int32_t* out) {
  const auto* weights = reinterpret_cast<const std::int8_t*>(panel);
  for (int r = 0; r < kRows; ++r) {
    const auto* values = reinterpret_cast<const std::int8_t*>(x + r * stride);
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
                                                          std::int64_t stride, std::int32_t* out) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i total[kRows], weight_sum = _mm512_setzero_si512();
  for (__m512i& v : total) v = _mm512_setzero_si512();
  for (std::int64_t line = 0; line < lines; ++line) {
    __builtin_prefetch(panel + line * kLineBytes + kAhead);
    const __m512i w = _mm512_loadu_si512(panel + line * kLineBytes);
    weight_sum = _mm512_dpbusd_epi32(weight_sum, offset, w);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i group = _mm512_xor_si512(_mm512_set1_epi32(group_at(x + r * stride + line * 4)), offset);
      total[r] = _mm512_dpbusd_epi32(total[r], group, w);
    }
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_si512(out + r * kTileColumns, _mm512_sub_epi32(total[r], weight_sum));
}
#endif

// ---- a tile
// ----------------------------------------------------------------------------------------------------------

using PanelKernel = void (*)(const char*, std::int64_t, const char*, std::int64_t, void*);

template <int kRows>
void run_bf16(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, void* out) {
#ifdef GEAR_ISA_avx512
  if (has_avx512_bf16()) return bf16_panel_dot<kRows>(panel, lines, x, stride, static_cast<float*>(out));
#endif
  bf16_panel<kRows>(panel, lines, x, stride, static_cast<float*>(out));
}

template <int kRows>
void run_int8(const char* panel, std::int64_t lines, const char* x, std::int64_t stride, void* out) {
#ifdef GEAR_ISA_avx512
  if (has_avx512_vnni()) return int8_panel_dot<kRows>(panel, lines, x, stride, static_cast<std::int32_t*>(out));
#endif
  int8_panel<kRows>(panel, lines, x, stride, static_cast<std::int32_t*>(out));
}

constexpr PanelKernel kBf16Kernels[kRowsAtOnce] = {&run_bf16<1>, &run_bf16<2>, &run_bf16<3>, &run_bf16<4>};
constexpr PanelKernel kInt8Kernels[kRowsAtOnce] = {&run_int8<1>, &run_int8<2>, &run_int8<3>, &run_int8<4>};

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

void linear_panels(const TileTask& task, Tile& tile) {
  const bool is_int8 = task.call->kind == WeightKind::int8_panels;
  const std::int64_t bytes = is_int8 ? 1 : 2;
  const std::int64_t panel_bytes = packed_panel_bytes(task.call->in_features, bytes);
  const char* weight = static_cast<const char*>(task.weight) + task.first_column / kPanelColumns * panel_bytes;
  const char* x = static_cast<const char*>(task.operand->data) + task.first_row * task.operand->stride;
  const PanelKernel* kernels = is_int8 ? kInt8Kernels : kBf16Kernels;
  for (int column = 0; column < task.n_columns; column += kPanelColumns, weight += panel_bytes) {
    for (int r = 0; r < task.n_rows; r += kRowsAtOnce) {
      const int n = task.n_rows - r < kRowsAtOnce ? task.n_rows - r : kRowsAtOnce;
      kernels[n - 1](weight, panel_bytes / kLineBytes, x + r * task.operand->stride, task.operand->stride,
                     &tile.values[r][column]);
    }
  }
  if (is_int8) scale_int8_products(task, tile);
}

}  // namespace gear::GEAR_ISA
