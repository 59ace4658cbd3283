// What surrounds the products: operands (RMSNorm, rounding, quantisation) and epilogues (SwiGLU, residual).
#include "cpu/skinny_linear.h"

#include "common/packing.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/simd_bf16.h"

namespace gear::GEAR_ISA {
namespace {

using TileKernel = void (*)(const TileTask&, Tile&);

bool in_place(WeightKind kind) { return kind == WeightKind::f32_rows || kind == WeightKind::bf16_rows; }

TileKernel choose_kernel(WeightKind kind) {
  if (in_place(kind)) return &linear_rows;
#ifdef GEAR_ISA_avx512
  if (kind == WeightKind::bf16_panels ? has_amx_bf16() : has_amx_int8()) return &linear_amx;
#endif
  return &linear_panels;
}

// Of an operand's element: fp32, int16, bf16 or int8.
std::int64_t element_bytes(WeightKind kind, bool wide) {
  return in_place(kind) ? 4 : (kind == WeightKind::int8_panels ? 1 : 2) * (wide ? 2 : 1);
}

// ---- operands
// --------------------------------------------------------------------------------------------------------

float sum_of_squares(const float* x, std::int64_t n) {
  Vec total = zero();
  std::int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) total = fma(load(x + k), load(x + k), total);
  if (k < n) {
    const Vec rest = load_first(x + k, static_cast<int>(n - k));
    total = fma(rest, rest, total);
  }
  return sum(total);
}

// wide[0 … n) = the row in fp32, normalised and weighted if asked; zeros up to n_padded.
template <class T>
void widen_row(const Linear& call, std::int64_t row, float* wide, std::int64_t n_padded) {
  const std::int64_t n = call.in_features;
  const T* x = static_cast<const T*>(call.x) + row * n;
  for (std::int64_t k = 0; k < n; ++k) wide[k] = to_float(x[k]);
  for (std::int64_t k = n; k < n_padded; ++k) wide[k] = 0.0f;
  if (call.norm_weight == nullptr) return;
  const T* weight = static_cast<const T*>(call.norm_weight);
  const float mean = sum_of_squares(wide, n) / static_cast<float>(n);
  const float scale = 1.0f / __builtin_sqrtf(mean + call.norm_eps);
  // Rounded to the activations' dtype before and after the weight, as the models do.
  for (std::int64_t k = 0; k < n; ++k) {
    const float normalised = to_float(from_float<T>(wide[k] * scale));
    wide[k] = to_float(from_float<T>(normalised * to_float(weight[k])));
  }
}

inline void store_integers(std::int8_t* q, Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) q[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(lanes[i]));
}

inline void store_integers(std::int16_t* q, Vec x) {
#if defined(GEAR_ISA_avx2)
  const __m256i whole = _mm256_cvtps_epi32(x);
  const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), packed);
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) q[i] = static_cast<std::int16_t>(static_cast<std::int32_t>(lanes[i]));
#endif
}

// q = round(x * 127 / max|x|) and the scale max|x| / 127 that undoes it.
template <class Integer>
float quantise_row(const float* wide, std::int64_t n_padded, Integer* q) {
  Vec largest = zero();
  for (std::int64_t k = 0; k < n_padded; k += kLanes) largest = max(largest, abs(load(wide + k)));
  const float top = max(largest);
  const Vec inverse = splat(top > 0.0f ? 127.0f / top : 0.0f);
  for (std::int64_t k = 0; k < n_padded; k += kLanes) store_integers(q + k, round(mul(load(wide + k), inverse)));
  return top / 127.0f;
}

void round_row(const float* wide, std::int64_t n_padded, bf16* out) {
  for (std::int64_t k = 0; k < n_padded; k += kLanes) store_rounded(out + k, load(wide + k));
}

void round_row(const float* wide, std::int64_t n_padded, float* out) {
  bf16 rounded[kLanes];
  for (std::int64_t k = 0; k < n_padded; k += kLanes) {
    store_rounded(rounded, load(wide + k));
    store(out + k, load(rounded));
  }
}

void prepare_row(const Linear& call, const Operand& operand, std::int64_t row, std::int64_t n_padded) {
  char* out = static_cast<char*>(operand.data) + row * operand.stride;
  // Memory of this thread: what another one wrote there before would have to be fetched from its core.
  const auto bytes = static_cast<std::size_t>(n_padded) * sizeof(float);
  float* wide = reinterpret_cast<float*>(in_place(call.kind) ? out : scratch(Scratch::wide_row, bytes));
  if (call.activation == Dtype::f32) {
    widen_row<float>(call, row, wide, n_padded);
  } else {
    widen_row<bf16>(call, row, wide, n_padded);
  }
  if (call.kind == WeightKind::int8_panels) {
    operand.row_scales[row] = operand.wide ? quantise_row(wide, n_padded, reinterpret_cast<std::int16_t*>(out))
                                           : quantise_row(wide, n_padded, reinterpret_cast<std::int8_t*>(out));
  } else if (call.kind == WeightKind::bf16_panels) {
    operand.wide ? round_row(wide, n_padded, reinterpret_cast<float*>(out))
                 : round_row(wide, n_padded, reinterpret_cast<bf16*>(out));
  }
}

Operand prepare(const Linear& call, bool wide_operand) {
  const std::int64_t bytes = element_bytes(call.kind, wide_operand);
  const std::int64_t n_padded = (call.in_features + 63) / 64 * 64;
  // A line more than the row, so that equal columns of many rows do not fall into one cache set.
  const std::int64_t stride = n_padded * bytes + 64;
  const std::int64_t data_bytes = (call.rows * stride + 63) / 64 * 64;
  const std::int64_t scale_bytes = (call.rows * 4 + 63) / 64 * 64;
  char* memory = static_cast<char*>(scratch(Scratch::operand, static_cast<std::size_t>(data_bytes + scale_bytes)));
  const Operand operand{memory, reinterpret_cast<float*>(memory + data_bytes), stride, wide_operand};
  const auto one_row = [&](std::int64_t row) { prepare_row(call, operand, row, n_padded); };
  if (call.rows * call.in_features < 8192) {
    for (std::int64_t row = 0; row < call.rows; ++row) one_row(row);
  } else {
    parallel_for(call.rows, one_row);
  }
  return operand;
}

// ---- epilogue
// --------------------------------------------------------------------------------------------------------

void gate_row(float* values, const float* gate, int n) {
  // n is at most kTileColumns and a tile's row has that many columns: whole vectors stay inside.
  for (int i = 0; i < n; i += kLanes) {
    const Vec x = load(values + i);
    const Vec silu = div(x, add(splat(1.0f), exp(sub(zero(), x))));
    store(values + i, mul(silu, load(gate + i)));
  }
}

template <class T>
void add_residual(const Linear& call, std::int64_t offset, int n, float* values) {
  const T* residual = static_cast<const T*>(call.residual) + offset;
  for (int i = 0; i < n; ++i) values[i] = to_float(residual[i]) + values[i];
}

void store_row(const Linear& call, std::int64_t row, std::int64_t first, int n, float* values) {
  const std::int64_t offset = row * call.out_features + first;
  if (call.residual != nullptr) {
    if (call.activation == Dtype::f32) {
      add_residual<float>(call, offset, n, values);
    } else {
      add_residual<bf16>(call, offset, n, values);
    }
  }
  if (call.output == Dtype::f32) {
    float* y = static_cast<float*>(call.y) + offset;
    for (int i = 0; i < n; ++i) y[i] = values[i];
  } else {
    bf16* y = static_cast<bf16*>(call.y) + offset;
    for (int i = 0; i < n; ++i) y[i] = from_float<bf16>(values[i]);
  }
}

// `next`: the first column of the block that the thread is likely to compute after this one.
void compute_block(const Linear& call, const Operand& operand, TileKernel kernel, std::int64_t first, int n,
                   std::int64_t next) {
  Tile tile, gate;
  // Tiles as equal as can be: the last of them is not for a single row.
  const std::int64_t n_tiles = (call.rows + kTileRows - 1) / kTileRows;
  for (std::int64_t i = 0, row = 0, n_rows; i < n_tiles; ++i, row += n_rows) {
    n_rows = (call.rows - row) / (n_tiles - i);
    const int n_now = static_cast<int>(n_rows);
    const std::int64_t after = i + 1 < n_tiles ? first : next;
    if (call.gate == nullptr) {
      kernel(TileTask{&call, &operand, call.weight, call.scales, row, n_now, first, n, call.weight, after}, tile);
    } else {
      kernel(TileTask{&call, &operand, call.weight, call.scales, row, n_now, first, n, call.gate, first}, tile);
      kernel(TileTask{&call, &operand, call.gate, call.gate_scales, row, n_now, first, n, call.weight, after}, gate);
      for (int r = 0; r < n_now; ++r) gate_row(tile.values[r], gate.values[r], n);
    }
    for (int r = 0; r < n_now; ++r) store_row(call, row + r, first, n, tile.values[r]);
  }
}

}  // namespace

void linear(const Linear& call) {
  const TileKernel kernel = choose_kernel(call.kind);
  const Operand operand = prepare(call, kernel == &linear_panels && wide_panels(call.kind));
  // Panels are fastest four abreast; narrower blocks where there would be too few to share among the threads.
  std::int64_t width = in_place(call.kind) ? 16 : kTileColumns;
  while (width > kPanelColumns && call.out_features < 4 * width * num_threads()) width /= 2;
  const std::int64_t n_blocks = (call.out_features + width - 1) / width;
  const std::int64_t step = width * num_threads();
  parallel_for(n_blocks, [&](std::int64_t block) {
    const std::int64_t first = block * width;
    const std::int64_t left = call.out_features - first;
    compute_block(call, operand, kernel, first, static_cast<int>(left < width ? left : width),
                  step < left ? first + step : first);
  });
}

}  // namespace gear::GEAR_ISA
