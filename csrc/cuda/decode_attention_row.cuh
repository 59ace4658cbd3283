// What a block of decode attention knows of its row and head: arguments, place in the cache, and the new token's query,
// key and value in shared memory. See decode_attention.cu.
#pragma once

#include <cstdint>

#include "common/attention_chunks.h"
#include "common/narrow_floats.h"
#include "cuda/elements.cuh"
#include "cuda/platform.cuh"

namespace gear::cuda::attention {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpKeys = kChunkEntries / kWarps;
constexpr int kMaxHeadDim = 256;
constexpr unsigned kWarp = 0xffffffffu;

struct Attend {
  const void* qkv;
  Dtype qkv_dtype;
  std::int64_t qkv_stride;
  int n_head, n_kv_head, head_dim;
  unsigned char* k_cache;
  unsigned char* v_cache;
  std::int64_t num_slots;
  int num_entries;
  std::int64_t slot_stride, head_stride, entry_stride;  // bytes
  float16* k_scale;
  float16* v_scale;
  std::int64_t scale_slot_stride, scale_head_stride;
  const float* prefix_bias;
  const std::int64_t* slots;
  const std::int64_t* positions;
  const float* rope;
  void* out;
  float* stored;
  int* arrived;
};

// One head of one row: what the phases share.
struct Head {
  int row, head, kv_head, position, n_entries;
  bool exists;
  std::int64_t offset;        // bytes, of the slot's entries of this head
  std::int64_t scale_offset;  // elements
};

struct Shared {
  float q[kMaxHeadDim];
  uint4 new_key[kMaxHeadDim / 4], new_value[kMaxHeadDim / 4];  // as they lie in the cache
  float16 new_k_scale, new_v_scale;
  float scores[kChunkEntries];
  float parts[kWarps][kMaxHeadDim];
  bool last;
};

// Phase 1, one warp per vector: q (vector 0), the new key (1) and value (2) of this head, rotated and rounded; the key
// and value in the cache's form, their padding zero.
template <class T>
__device__ void prepare(const Attend& call, const Head& at, int vector, Shared& shared) {
  const int lane = threadIdx.x % 32, d = call.head_dim;
  const int heads_before = vector == 0 ? at.head : call.n_head + (vector - 1) * call.n_kv_head + at.kv_head;
  const std::int64_t start = at.row * call.qkv_stride + static_cast<std::int64_t>(heads_before) * d;
  const float* rope = call.rope + static_cast<std::int64_t>(at.position) * d;
  float x[kMaxHeadDim / 32];
  std::int32_t largest = 0;  // |x| compared as integers: what is no number is the largest
#pragma unroll
  for (int step = 0; step < kMaxHeadDim / 64; ++step) {
    const int i = 2 * (lane + 32 * step);
    float even = 0.0f, odd = 0.0f;
    if (i < d) {
      even = load_element(call.qkv, call.qkv_dtype, start + i);
      odd = load_element(call.qkv, call.qkv_dtype, start + i + 1);
      if (vector < 2) {
        const float cos = rope[i], sin = rope[i + 1], before = even;
        even = round_to(call.qkv_dtype, before * cos - odd * sin);
        odd = round_to(call.qkv_dtype, odd * cos + before * sin);
      }
    }
    x[2 * step] = even;
    x[2 * step + 1] = odd;
    largest = max(largest, max(float_bits(even) & 0x7fffffff, float_bits(odd) & 0x7fffffff));
  }
  float divisor = 1.0f;
  bool zeros = false;
  if constexpr (sizeof(T) == 1) {
    if (vector > 0) {
      const float16 scale = from_float<float16>(bits_float(__reduce_max_sync(kWarp, largest)) / 448.0f);
      divisor = to_float(scale);
      zeros = !(divisor > 0.0f);
      if (lane == 0) (vector == 1 ? shared.new_k_scale : shared.new_v_scale) = scale;
    }
  }
  T* entry = reinterpret_cast<T*>(vector == 1 ? shared.new_key : shared.new_value);
#pragma unroll
  for (int step = 0; step < kMaxHeadDim / 64; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * (lane + 32 * step) + half;
      const float value = x[2 * step + half];
      if (vector == 0) {
        shared.q[i] = value;
      } else if constexpr (sizeof(T) == 1) {
        entry[i] = from_float<T>(zeros ? 0.0f : value / divisor);
      } else {
        entry[i] = from_float<T>(value);
      }
    }
  }
}

// Finds the row's slot and position; false if it is inert. Both are numbers of the device and may not exist.
__device__ inline bool locate(const Attend& call, Head& at, std::int64_t& slot) {
  slot = __ldcg(call.slots + at.row);
  const std::int64_t position = __ldcg(call.positions + at.row);
  if (slot < 0) return false;
  at.exists = slot < call.num_slots && position >= 0 && position + 1 < call.num_entries;
  at.position = static_cast<int>(position);
  at.n_entries = at.position + 2;
  at.offset = slot * call.slot_stride + at.kv_head * call.head_stride;
  at.scale_offset = slot * call.scale_slot_stride + at.kv_head * call.scale_head_stride;
  return true;
}

// Asks the L2 cache for a chunk's keys and values.
__device__ inline void prefetch_chunk(const Attend& call, const Head& at, int chunk, int element_bytes) {
  const int entry = chunk * kChunkEntries + threadIdx.x % kChunkEntries;
  if (entry >= at.n_entries - 1) return;  // the new entry is not there yet
  const unsigned char* row =
      (threadIdx.x < kChunkEntries ? call.k_cache : call.v_cache) + at.offset + entry * call.entry_stride;
  for (int byte = 0; byte < call.head_dim * element_bytes; byte += 128) prefetch_l2(row + byte);
}

// The new entry, by the block that attends to it, once per key/value head.
template <class T>
__device__ void write_entry(const Attend& call, const Head& at, const Shared& shared) {
  constexpr int kEach = 16 / sizeof(T);
  const int words = (call.head_dim + kEach - 1) / kEach, word = threadIdx.x % 64, entry = at.n_entries - 1;
  const bool is_key = threadIdx.x < 64;
  unsigned char* to = (is_key ? call.k_cache : call.v_cache) + at.offset + entry * call.entry_stride;
  if (word < words) reinterpret_cast<uint4*>(to)[word] = (is_key ? shared.new_key : shared.new_value)[word];
  if (sizeof(T) == 1 && word == 0)
    (is_key ? call.k_scale : call.v_scale)[at.scale_offset + entry] = is_key ? shared.new_k_scale : shared.new_v_scale;
}

}  // namespace gear::cuda::attention
