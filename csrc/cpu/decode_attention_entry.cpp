#include "cpu/decode_attention.h"

namespace gear::cpu {

void attend(const DecodeAttention& call) {
  if (call.rows > 0) GEAR_DISPATCH(attend)(call);
}

void decode_attention(const void* qkv, int dtype, std::int64_t qkv_stride, std::int64_t rows, std::int64_t n_head,
                      std::int64_t n_kv_head, std::int64_t head_dim, void* k_cache, void* v_cache,
                      std::int64_t slot_stride, std::int64_t head_stride, std::int64_t entry_stride,
                      const float* prefix_bias, const std::int64_t* slots, const std::int64_t* positions,
                      const float* rope, void* out) {
  attend(DecodeAttention{rows, n_head, n_kv_head, head_dim, static_cast<Dtype>(dtype), qkv, qkv_stride, k_cache,
                         v_cache, slot_stride, head_stride, entry_stride, prefix_bias, slots, positions, rope, out});
}

}  // namespace gear::cpu
