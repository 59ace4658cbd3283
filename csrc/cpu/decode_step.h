// One image token per row through the whole model: the layers' calls of skinny_linear and decode_attention, made in one
// call from Python. At the size of LlamaGen-B a step is 62 such calls of 50 to 200 microseconds: crossing into Python
// for each would cost as much as the int8 weights do. See ops/decode_step.py.
#pragma once

#include <cstdint>

#include "common/narrow_floats.h"
#include "cpu/skinny_linear.h"

namespace gear {

struct StepWeight {
  std::int64_t kind;  // WeightKind
  const void* data;
  const float* scales;
};

struct StepLayer {
  const void* attention_norm;
  StepWeight wqkv, wo;
  const void* ffn_norm;
  StepWeight w1, w3, w2;
};

// What ops/decode_step.py writes as 64-bit words, in this order; `layers` follow it, `n_layer` of them.
struct StepModel {
  std::int64_t n_layer, dim, ffn_dim, vocab_size, n_head, n_kv_head;
  std::int64_t dtype;  // Dtype of activations, embeddings and norms, and of the cache unless it has scales (fp8)
  const void* tok_embeddings;
  const void* norm;
  StepWeight output;
  void* kv;
  std::int64_t num_slots, num_entries;
  std::int64_t layer_stride, value_offset, slot_stride, head_stride, entry_stride;  // elements of kv
  float16* scales;                                                                  // or null
  std::int64_t scale_layer_stride, scale_value_offset, scale_slot_stride, scale_head_stride;
  const float* prefix_bias;
  const float* rope;
};
static_assert(sizeof(StepModel) == 27 * 8 && sizeof(StepLayer) == 17 * 8);

namespace cpu {

// tokens, slots, positions: (rows); logits: fp32 (rows, vocab_size). Throws std::out_of_range, before anything is
// written, if a token, slot or position does not exist.
void decode_step(const std::int64_t* model, float norm_eps, std::int64_t rows, const std::int64_t* tokens,
                 const std::int64_t* slots, const std::int64_t* positions, float* logits);

}  // namespace cpu
}  // namespace gear
