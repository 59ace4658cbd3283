// Products with packed weights on AMX tile registers: 16 rows of x by 16 columns of weights per instruction.
//
// Tile registers: 0-3 accumulate four panels, 4 holds x, 5-7 weights. The hardware computes every row of a tile alike,
// whatever the number of rows, so a row's bits do not depend on its neighbours. With two rows (one image under
// guidance) the four streams of weights run at memory bandwidth; with sixteen the arithmetic still keeps up with them.
#include "cpu/skinny_linear.h"

#if defined(GEAR_ISA_avx512)

#include "common/packing.h"
#include "cpu/simd.h"

#define GEAR_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))

namespace gear::avx512 {
namespace {

constexpr std::int64_t kTileBytes = kTileLines * kLineBytes;
constexpr int kAhead = 2048;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t column_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

GEAR_AMX void configure(int n_rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.column_bytes[i] = 64;
    config.rows[i] = static_cast<std::uint8_t>(i < 5 ? n_rows : 16);
  }
  _tile_loadconfig(&config);
}

inline void prefetch_tile(const char* tile) {
  for (int line = 0; line < kTileLines; ++line) __builtin_prefetch(tile + line * kLineBytes + kAhead);
}

#define GEAR_MULTIPLY(total, x, w) \
  do {                             \
    if constexpr (kInt8) {         \
      _tile_dpbssd(total, x, w);   \
    } else {                       \
      _tile_dpbf16ps(total, x, w); \
    }                              \
  } while (0)

template <bool kInt8, int kPanels>
GEAR_AMX void panels(const char* weight, std::int64_t panel_bytes, const char* x, std::int64_t stride, float* out) {
  static_assert(kPanels >= 1 && kPanels <= 4);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t at = 0; at < panel_bytes; at += kTileBytes, x += kLineBytes) {
    const char* w = weight + at;
    for (int p = 0; p < kPanels; ++p) prefetch_tile(w + p * panel_bytes);
    _tile_loadd(4, x, stride);
    _tile_loadd(5, w, kLineBytes);
    GEAR_MULTIPLY(0, 4, 5);
    if constexpr (kPanels > 1) {
      _tile_loadd(6, w + panel_bytes, kLineBytes);
      GEAR_MULTIPLY(1, 4, 6);
    }
    if constexpr (kPanels > 2) {
      _tile_loadd(7, w + 2 * panel_bytes, kLineBytes);
      GEAR_MULTIPLY(2, 4, 7);
    }
    if constexpr (kPanels > 3) {
      _tile_loadd(5, w + 3 * panel_bytes, kLineBytes);
      GEAR_MULTIPLY(3, 4, 5);
    }
  }
  constexpr int kStride = kTileColumns * 4;
  _tile_stored(0, out, kStride);
  if constexpr (kPanels > 1) _tile_stored(1, out + 16, kStride);
  if constexpr (kPanels > 2) _tile_stored(2, out + 32, kStride);
  if constexpr (kPanels > 3) _tile_stored(3, out + 48, kStride);
}

}  // namespace

GEAR_AMX void linear_amx(const TileTask& task, Tile& tile) {
  const bool is_int8 = task.call->kind == WeightKind::int8_panels;
  const std::int64_t panel_bytes = packed_panel_bytes(task.call->in_features, is_int8 ? 1 : 2);
  const char* weight = static_cast<const char*>(task.weight) + task.first_column / kPanelColumns * panel_bytes;
  const char* x = static_cast<const char*>(task.operand->data) + task.first_row * task.operand->stride;
  using Kernel = void (*)(const char*, std::int64_t, const char*, std::int64_t, float*);
  static constexpr Kernel kBf16[4] = {&panels<false, 1>, &panels<false, 2>, &panels<false, 3>, &panels<false, 4>};
  static constexpr Kernel kInt8[4] = {&panels<true, 1>, &panels<true, 2>, &panels<true, 3>, &panels<true, 4>};
  const int n_panels = (task.n_columns + 15) / 16;
  configure(task.n_rows);
  (is_int8 ? kInt8 : kBf16)[n_panels - 1](weight, panel_bytes, x, task.operand->stride, &tile.values[0][0]);
  _tile_release();
  if (is_int8) scale_int8_products(task, tile);
}

}  // namespace gear::avx512

#endif
