// One new token per row: rotate, write to the cache, attend; see ops/decode_attention.py.
#pragma once

#include <cstdint>

#include "common/narrow_floats.h"
#include "cpu/isa.h"
#include "cpu/skinny_linear.h"

namespace gear {

// The slot of a row that takes no part: nothing is read or written for it, its output is zero.
constexpr std::int64_t kInertSlot = -1;

// One call. `dtype` is that of qkv and out, and of both caches unless they have scales: those hold e4m3 numbers.
// Strides are in elements; a head's last dimension and the entries of the scales are contiguous.
struct DecodeAttention {
  std::int64_t rows, n_head, n_kv_head, head_dim;
  Dtype dtype;
  const void* qkv;
  std::int64_t qkv_stride;
  void* k_cache;
  void* v_cache;
  std::int64_t num_slots, num_entries;  // of the caches
  std::int64_t slot_stride, head_stride, entry_stride;
  float16* k_scale;  // (num_slots, n_kv_head, num_entries), or null
  float16* v_scale;
  std::int64_t scale_slot_stride, scale_head_stride;
  const float* prefix_bias;       // (num_slots)
  const std::int64_t* slots;      // (rows), kInertSlot for a row that takes no part
  const std::int64_t* positions;  // (rows)
  const float* rope;              // (block_size, head_dim / 2, 2)
  void* out;                      // (rows, n_head * head_dim)
};

namespace cpu {

// Throws std::out_of_range, before anything is written, if a slot or a position does not exist.
void attend(const DecodeAttention& call);

void decode_attention(const void* qkv, int dtype, std::int64_t qkv_stride, std::int64_t rows, std::int64_t n_head,
                      std::int64_t n_kv_head, std::int64_t head_dim, void* k_cache, void* v_cache,
                      std::int64_t num_slots, std::int64_t num_entries, std::int64_t slot_stride,
                      std::int64_t head_stride, std::int64_t entry_stride, void* k_scale, void* v_scale,
                      std::int64_t scale_slot_stride, std::int64_t scale_head_stride, const float* prefix_bias,
                      const std::int64_t* slots, const std::int64_t* positions, const float* rope, void* out);

}  // namespace cpu
}  // namespace gear

GEAR_DECLARE_ISA(void, attend, (const DecodeAttention& call))
