// One new token per row: rotate, write to the cache, attend; see ops/decode_attention.py.
#pragma once

#include <cstdint>

namespace gear::cuda {

// `qkv_dtype` (also out's) and `cache_dtype`: 0 fp32, 1 bf16, 2 fp16, 3 fp8 (caches only). Strides are in elements; the
// caches' are multiples of 16 bytes, and an entry has whole words of 16 bytes, as `head_dim` is padded in memory.
// `k_scale`, `v_scale`: fp16 of an fp8 cache. `splits`: blocks that share a row's head; more than one needs `stored`
// (rows * n_head * chunks of the longest row * (head_dim + 2) floats) and `arrived` (rows * n_head ints, zero before
// and after).
void decode_attention(const void* qkv, int qkv_dtype, std::int64_t qkv_stride, std::int64_t rows, std::int64_t n_head,
                      std::int64_t n_kv_head, std::int64_t head_dim, void* k_cache, void* v_cache, int cache_dtype,
                      std::int64_t num_slots, std::int64_t num_entries, std::int64_t slot_stride,
                      std::int64_t head_stride, std::int64_t entry_stride, void* k_scale, void* v_scale,
                      std::int64_t scale_slot_stride, std::int64_t scale_head_stride, const float* prefix_bias,
                      const std::int64_t* slots, const std::int64_t* positions, const float* rope, void* out,
                      std::int64_t splits, float* stored, int* arrived, void* stream);

}  // namespace gear::cuda
