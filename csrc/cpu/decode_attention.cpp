// Keys are cut into fixed chunks of 64. A chunk gives (max, sum, accumulator) of its softmax, and chunks merge in
// order, so that a row's bits depend on its own cache only. One task is one row and one key/value head with its group
// of queries.
#include "cpu/decode_attention.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

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
void soften(Head& head, int n, float scale, float first_bias, bool has_prefix, float& max_out, float& sum_out) {
  const float lowest = -__builtin_inff();
  for (int j = 0; j < n; ++j) head.weights[j] *= scale;
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

template <class T>
void attend_head(const DecodeAttention& call, Head& head, const T* keys, const T* values, std::int64_t n_entries,
                 float prefix_bias) {
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(call.head_dim));
  for (std::int64_t first = 0; first < n_entries; first += kChunk) {
    const int n = static_cast<int>(n_entries - first < kChunk ? n_entries - first : kChunk);
    const T* chunk_keys = keys + first * call.entry_stride;
    const T* chunk_values = values + first * call.entry_stride;
    scores(head, chunk_keys, chunk_values, call.entry_stride, n, call.head_dim, head.weights);
    float chunk_max, chunk_sum;
    soften(head, n, scale, prefix_bias, first == 0, chunk_max, chunk_sum);
    const std::int64_t left = n_entries - first - n;
    prefetch_rows(chunk_keys + n * call.entry_stride, call.entry_stride,
                  static_cast<int>(left < kChunk / 4 ? left : kChunk / 4), call.head_dim);
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

template <class T>
void attend_group(const DecodeAttention& call, std::int64_t row, std::int64_t kv_head) {
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
  T* keys = static_cast<T*>(call.k_cache) + base;
  T* values = static_cast<T*>(call.v_cache) + base;
  // Phase 1: this token's key and value.
  rotate(qkv + dim + kv_head * d, rope, d, keys + (1 + position) * call.entry_stride);
  const T* new_value = qkv + dim + (call.n_kv_head + kv_head) * d;
  for (std::int64_t i = 0; i < d; ++i) values[(1 + position) * call.entry_stride + i] = new_value[i];
  // Phase 2: each query of the group.
  Head head;
  for (std::int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    T rotated[kMaxHeadDim];
    rotate(qkv + h * d, rope, d, rotated);
    for (std::int64_t i = 0; i < d; ++i) head.q[i] = to_float(rotated[i]);
    for (std::int64_t i = d; i < (d + kLanes - 1) / kLanes * kLanes; ++i) head.q[i] = 0.0f;
    attend_head(call, head, keys, values, position + 2, call.prefix_bias[slot]);
    const float inverse = 1.0f / head.sum;
    T* out = static_cast<T*>(call.out) + row * dim + h * d;
    for (std::int64_t i = 0; i < d; ++i) out[i] = from_float<T>(head.out[i] * inverse);
  }
}

}  // namespace

void attend(const DecodeAttention& call) {
  parallel_for(call.rows * call.n_kv_head, [&](std::int64_t task) noexcept {
    const std::int64_t row = task / call.n_kv_head, kv_head = task % call.n_kv_head;
    if (call.dtype == Dtype::f32) {
      attend_group<float>(call, row, kv_head);
    } else {
      attend_group<bf16>(call, row, kv_head);
    }
  });
}

}  // namespace gear::GEAR_ISA
