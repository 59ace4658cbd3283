#include "cpu/decode_attention.h"

#include <stdexcept>

namespace gear::cpu {

void attend(const DecodeAttention& call) {
  for (std::int64_t row = 0; row < call.rows; ++row) {
    if (call.slots[row] == kInertSlot) continue;
    if (call.slots[row] < 0 || call.slots[row] >= call.num_slots) throw std::out_of_range("a slot is not in the cache");
    if (call.positions[row] < 0 || call.positions[row] + 1 >= call.num_entries)
      throw std::out_of_range("a position is not in the cache");
  }
  if (call.rows > 0) GEAR_DISPATCH(attend)(call);
}

void decode_attention(const void* qkv, int dtype, std::int64_t qkv_stride, std::int64_t rows, std::int64_t n_head,
                      std::int64_t n_kv_head, std::int64_t head_dim, void* k_cache, void* v_cache,
                      std::int64_t num_slots, std::int64_t num_entries, std::int64_t slot_stride,
                      std::int64_t head_stride, std::int64_t entry_stride, void* k_scale, void* v_scale,
                      std::int64_t scale_slot_stride, std::int64_t scale_head_stride, const float* prefix_bias,
                      const std::int64_t* slots, const std::int64_t* positions, const float* rope, void* out) {
  attend(DecodeAttention{rows,
                         n_head,
                         n_kv_head,
                         head_dim,
                         static_cast<Dtype>(dtype),
                         qkv,
                         qkv_stride,
                         k_cache,
                         v_cache,
                         num_slots,
                         num_entries,
                         slot_stride,
                         head_stride,
                         entry_stride,
                         static_cast<float16*>(k_scale),
                         static_cast<float16*>(v_scale),
                         scale_slot_stride,
                         scale_head_stride,
                         prefix_bias,
                         slots,
                         positions,
                         rope,
                         out});
}

}  // namespace gear::cpu
