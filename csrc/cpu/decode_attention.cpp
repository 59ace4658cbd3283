// Keys are cut into fixed chunks of 64. A chunk gives (max, sum, accumulator) of its softmax, and chunks merge in
// order, so that a row's bits depend on its own cache only. One task is one row and one key/value head with its group
// of queries. An fp8 entry's scale multiplies its key's score and its value's weight, not their elements.
#include "cpu/decode_attention.h"

#include "cpu/parallel.h"
#include "cpu/simd_fp8.h"

namespace gear::GEAR_ISA {
namespace {

constexpr int kChunk = 64;
constexpr int kMaxHeadDim = 256;

struct alignas(64) Head {
  float q[kMaxHeadDim];     // rotated, zeros behind head_dim
  float out[kMaxHeadDim];   // accumulator over the chunks so far
  float part[kMaxHeadDim];  // accumulator of one chunk
  float weights[kChunk];    // logits, then exp(logits - max)
  float max, sum;
};

// Rotates pairs in fp32 and rounds to T.
template <class T>
void rotate(const T* x, const float* rope, std::int64_t head_dim, T* out) {
  for (std::int64_t i = 0; i < head_dim; i += 2) {
    const float even = to_float(x[i]), odd = to_float(x[i + 1]);
    const float cos = rope[i], sin = rope[i + 1];
    out[i] = from_float<T>(even * cos - odd * sin);
    out[i + 1] = from_float<T>(odd * cos + even * sin);
  }
}

// Asks for `count` rows of a cache: a chunk's values while its keys are read, the next keys while values are read.
template <class T>
inline void prefetch_rows(const T* rows, std::int64_t stride, int count, std::int64_t head_dim) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  for (int j = 0; j < count; ++j)
    for (std::int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(rows + j * stride + d);
}

// weights[0 … n) = q . key_j, whole vectors of keys at a time; a key past the end repeats the last one.
template <class T>
void scores(const Head& head, const T* keys, const T* values, std::int64_t stride, int n, std::int64_t head_dim,
            float* weights) {
  const std::int64_t whole = head_dim / kLanes * kLanes;
  const int rest = static_cast<int>(head_dim - whole);
  for (int j = 0; j < n; j += kLanes) {
    const int next = n - j - kLanes < kLanes ? n - j - kLanes : kLanes;
    prefetch_rows(keys + (j + kLanes) * stride, stride, next, head_dim);
    prefetch_rows(values + j * stride, stride, n - j < kLanes ? n - j : kLanes, head_dim);
    const T* key[kLanes];
    for (int i = 0; i < kLanes; ++i) key[i] = keys + (j + i < n ? j + i : n - 1) * stride;
    Vec total[kLanes];
    for (Vec& v : total) v = zero();
    for (std::int64_t d = 0; d < whole; d += kLanes) {
      const Vec q = load(head.q + d);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) total[i] = fma(q, load(key[i] + d), total[i]);
    }
    if (rest > 0) {
      const Vec q = load(head.q + whole);
      for (int i = 0; i < kLanes; ++i) total[i] = fma(q, load_first(key[i] + whole, rest), total[i]);
    }
    store(weights + j, sum_each(total));
  }
}

// part = sum_j weights[j] values[j]; even and odd keys have accumulators of their own, added at the end.
template <class T, int kVectors>
void weigh_values(const float* weights, const T* values, std::int64_t stride, int n, float* part) {
  Vec even[kVectors], odd[kVectors];
  for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = zero();
  int j = 0;
  for (; j + 2 <= n; j += 2) {
    const Vec w0 = splat(weights[j]), w1 = splat(weights[j + 1]);
    const T *v0 = values + j * stride, *v1 = v0 + stride;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      even[v] = fma(w0, load(v0 + v * kLanes), even[v]);
      odd[v] = fma(w1, load(v1 + v * kLanes), odd[v]);
    }
  }
  if (j < n) {
    const Vec w0 = splat(weights[j]);
    for (int v = 0; v < kVectors; ++v) even[v] = fma(w0, load(values + j * stride + v * kLanes), even[v]);
  }
  for (int v = 0; v < kVectors; ++v) store(part + v * kLanes, add(even[v], odd[v]));
}

template <class T>
void weigh_values_rest(const float* weights, const T* values, std::int64_t stride, int n, int width, float* part) {
  Vec even = zero(), odd = zero();
  for (int j = 0; j < n; ++j) {
    const Vec v = load_first(values + j * stride, width);
    if (j % 2 == 0) {
      even = fma(splat(weights[j]), v, even);
    } else {
      odd = fma(splat(weights[j]), v, odd);
    }
  }
  float lanes[kLanes];
  store(lanes, add(even, odd));
  for (int i = 0; i < width; ++i) part[i] = lanes[i];
}

template <class T>
void weigh_all_values(const Head& head, const T* values, std::int64_t stride, int n, std::int64_t head_dim,
                      float* part) {
  std::int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) weigh_values<T, 4>(head.weights, values + d, stride, n, part + d);
  for (; d + kLanes <= head_dim; d += kLanes) weigh_values<T, 1>(head.weights, values + d, stride, n, part + d);
  if (d < head_dim) weigh_values_rest(head.weights, values + d, stride, n, static_cast<int>(head_dim - d), part + d);
}

// weights = exp(weights - max) and the chunk's sum and max; entries behind n become 0.
void soften(Head& head, int n, float first_bias, bool has_prefix, float& max_out, float& sum_out) {
  const float lowest = -__builtin_inff();
  for (int j = n; j < kChunk; ++j) head.weights[j] = lowest;
  if (has_prefix) head.weights[0] = first_bias;
  Vec top = splat(lowest);
  for (int j = 0; j < kChunk; j += kLanes) top = max(top, load(head.weights + j));
  max_out = max(top);
  Vec total = zero();
  for (int j = 0; j < kChunk; j += kLanes) {
    const Vec e = exp(sub(load(head.weights + j), splat(max_out)));
    store(head.weights + j, e);
    total = add(total, e);
  }
  sum_out = sum(total);
}

float exp_one(float x) {
  float lanes[kLanes];
  store(lanes, exp(splat(x)));
  return lanes[0];
}

// Adds a chunk's (max, sum, part) to the head's.
void merge(Head& head, std::int64_t head_dim, float chunk_max, float chunk_sum) {
  const float top = head.max > chunk_max ? head.max : chunk_max;
  const float old_scale = exp_one(head.max - top), new_scale = exp_one(chunk_max - top);
  for (std::int64_t d = 0; d < head_dim; ++d) head.out[d] = head.out[d] * old_scale + head.part[d] * new_scale;
  head.sum = head.sum * old_scale + chunk_sum * new_scale;
  head.max = top;
}

// One slot's entries of one key/value head; T is what they are stored in.
template <class T>
struct Entries {
  T *keys, *values;
  float16 *k_scale, *v_scale;  // of fp8 entries
};

// `ahead`: keys that the thread is likely to read after these.
template <class T>
void attend_head(const DecodeAttention& call, Head& head, const Entries<T>& entries, std::int64_t n_entries,
                 float prefix_bias, const T* ahead) {
  constexpr bool kFp8 = sizeof(T) == 1;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(call.head_dim));
  for (std::int64_t first = 0; first < n_entries; first += kChunk) {
    const int n = static_cast<int>(n_entries - first < kChunk ? n_entries - first : kChunk);
    const T* chunk_keys = entries.keys + first * call.entry_stride;
    const T* chunk_values = entries.values + first * call.entry_stride;
    scores(head, chunk_keys, chunk_values, call.entry_stride, n, call.head_dim, head.weights);
    if constexpr (kFp8) {
      apply_scales(head.weights, entries.k_scale + first, n, scale * kE4m3Unit);
    } else {
      for (int j = 0; j < n; ++j) head.weights[j] *= scale;
    }
    float chunk_max, chunk_sum;
    soften(head, n, prefix_bias, first == 0, chunk_max, chunk_sum);
    if constexpr (kFp8) apply_scales(head.weights, entries.v_scale + first, n, kE4m3Unit);
    const std::int64_t left = n_entries - first - n;
    if (left == 0) {
      prefetch_rows(ahead, call.entry_stride, kChunk / 4, call.head_dim);
    } else {
      prefetch_rows(chunk_keys + n * call.entry_stride, call.entry_stride,
                    static_cast<int>(left < kChunk / 4 ? left : kChunk / 4), call.head_dim);
    }
    if (first == 0) {
      weigh_all_values(head, chunk_values, call.entry_stride, n, call.head_dim, head.out);
      head.max = chunk_max;
      head.sum = chunk_sum;
    } else {
      weigh_all_values(head, chunk_values, call.entry_stride, n, call.head_dim, head.part);
      merge(head, call.head_dim, chunk_max, chunk_sum);
    }
  }
}

// One vector of the new token, quantized.
template <class T>
void write_quantized(const T* x, std::int64_t head_dim, float8* entry, float16* scale) {
  float wide[kMaxHeadDim];
  float8 stored[kMaxHeadDim];
  for (std::int64_t i = 0; i < head_dim; ++i) wide[i] = to_float(x[i]);
  for (std::int64_t i = head_dim; i < (head_dim + kLanes - 1) / kLanes * kLanes; ++i) wide[i] = 0.0f;
  quantize_entry(wide, head_dim, stored, scale);
  std::memcpy(entry, stored, static_cast<std::size_t>(head_dim));
}

// The new token's key and value.
template <class T, class Stored>
void write_entry(const DecodeAttention& call, const T* key, const T* value, const float* rope, std::int64_t entry,
                 const Entries<Stored>& entries) {
  const std::int64_t d = call.head_dim;
  Stored* new_key = entries.keys + entry * call.entry_stride;
  Stored* new_value = entries.values + entry * call.entry_stride;
  if constexpr (sizeof(Stored) == 1) {
    T rotated[kMaxHeadDim];
    rotate(key, rope, d, rotated);
    write_quantized(rotated, d, new_key, entries.k_scale + entry);
    write_quantized(value, d, new_value, entries.v_scale + entry);
  } else {
    rotate(key, rope, d, new_key);
    std::memcpy(new_value, value, static_cast<std::size_t>(d) * sizeof(T));
  }
}

// T is the dtype of qkv and out; the group that the thread is likely to take after this begins at `next` in the caches.
template <class T, class Stored>
void attend_group(const DecodeAttention& call, std::int64_t row, std::int64_t kv_head, std::int64_t next) {
  const std::int64_t d = call.head_dim, slot = call.slots[row], position = call.positions[row];
  const std::int64_t dim = call.n_head * d, group = call.n_head / call.n_kv_head;
  if (slot == kInertSlot) {
    T* out = static_cast<T*>(call.out) + row * dim + kv_head * group * d;
    for (std::int64_t i = 0; i < group * d; ++i) out[i] = from_float<T>(0.0f);
    return;
  }
  const T* qkv = static_cast<const T*>(call.qkv) + row * call.qkv_stride;
  const float* rope = call.rope + position * d;
  const std::int64_t base = slot * call.slot_stride + kv_head * call.head_stride;
  Entries<Stored> entries{static_cast<Stored*>(call.k_cache) + base, static_cast<Stored*>(call.v_cache) + base, nullptr,
                          nullptr};
  if constexpr (sizeof(Stored) == 1) {
    const std::int64_t scale_base = slot * call.scale_slot_stride + kv_head * call.scale_head_stride;
    entries.k_scale = call.k_scale + scale_base;
    entries.v_scale = call.v_scale + scale_base;
  }
  // Phase 1: this token's key and value.
  const T* key = qkv + dim + kv_head * d;
  write_entry(call, key, key + call.n_kv_head * d, rope, 1 + position, entries);
  // Phase 2: each query of the group.
  Head head;
  for (std::int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    T rotated[kMaxHeadDim];
    rotate(qkv + h * d, rope, d, rotated);
    for (std::int64_t i = 0; i < d; ++i) head.q[i] = to_float(rotated[i]);
    for (std::int64_t i = d; i < (d + kLanes - 1) / kLanes * kLanes; ++i) head.q[i] = 0.0f;
    attend_head(call, head, entries, position + 2, call.prefix_bias[slot],
                h + 1 < (kv_head + 1) * group ? entries.keys : static_cast<const Stored*>(call.k_cache) + next);
    const float inverse = 1.0f / head.sum;
    T* out = static_cast<T*>(call.out) + row * dim + h * d;
    for (std::int64_t i = 0; i < d; ++i) out[i] = from_float<T>(head.out[i] * inverse);
  }
}

}  // namespace

void attend(const DecodeAttention& call) {
  const std::int64_t n_tasks = call.rows * call.n_kv_head;
  parallel_for(n_tasks, [&](std::int64_t task) {
    const std::int64_t row = task / call.n_kv_head, kv_head = task % call.n_kv_head;
    const bool fp8 = call.k_scale != nullptr;
    const std::int64_t after = task + num_threads() < n_tasks ? task + num_threads() : task;
    const std::int64_t slot = call.slots[after / call.n_kv_head];
    const std::int64_t next =
        (slot == kInertSlot ? 0 : slot) * call.slot_stride + after % call.n_kv_head * call.head_stride;
    if (call.dtype == Dtype::f32) {
      fp8 ? attend_group<float, float8>(call, row, kv_head, next)
          : attend_group<float, float>(call, row, kv_head, next);
    } else {
      fp8 ? attend_group<bf16, float8>(call, row, kv_head, next) : attend_group<bf16, bf16>(call, row, kv_head, next);
    }
  });
}

}  // namespace gear::GEAR_ISA
