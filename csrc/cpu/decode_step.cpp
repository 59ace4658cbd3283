#include "cpu/decode_step.h"

#include <cstring>
#include <stdexcept>

#include "cpu/decode_attention.h"

namespace gear::cpu {
namespace {

// The rows' activations, all in one piece of scratch memory.
struct Hidden {
  char *h, *qkv, *attended, *ffn;
};

Hidden allocate(const StepModel& model, std::int64_t rows, std::int64_t qkv_dim, std::int64_t bytes) {
  const auto aligned = [](std::int64_t n) { return (n + 63) / 64 * 64; };
  const std::int64_t h = aligned(rows * model.dim * bytes), qkv = aligned(rows * qkv_dim * bytes);
  const std::int64_t ffn = aligned(rows * model.ffn_dim * bytes);
  char* memory = static_cast<char*>(scratch(Scratch::hidden, static_cast<std::size_t>(2 * h + qkv + ffn)));
  return {memory, memory + h, memory + h + qkv, memory + 2 * h + qkv};
}

Linear layer_call(const StepModel& model, float norm_eps, std::int64_t rows, std::int64_t in_features,
                  std::int64_t out_features, const StepWeight& weight, const void* x, void* y) {
  const Dtype dtype = static_cast<Dtype>(model.dtype);
  return Linear{rows,        in_features,   out_features,
                dtype,       dtype,         static_cast<WeightKind>(weight.kind),
                x,           nullptr,       norm_eps,
                weight.data, weight.scales, nullptr,
                nullptr,     nullptr,       y};
}

}  // namespace

void decode_step(const std::int64_t* words, float norm_eps, std::int64_t rows, const std::int64_t* tokens,
                 const std::int64_t* slots, const std::int64_t* positions, float* logits) {
  if (rows <= 0) return;
  StepModel model;
  std::memcpy(&model, words, sizeof model);
  const std::int64_t head_dim = model.dim / model.n_head;
  const std::int64_t qkv_dim = model.dim + 2 * model.n_kv_head * head_dim;
  const std::int64_t bytes = static_cast<Dtype>(model.dtype) == Dtype::f32 ? 4 : 2;
  const std::int64_t cache_bytes = model.scales == nullptr ? bytes : 1;
  const Hidden at = allocate(model, rows, qkv_dim, bytes);
  for (std::int64_t row = 0; row < rows; ++row) {
    if (tokens[row] < 0 || tokens[row] >= model.vocab_size) throw std::out_of_range("a token is not in the vocabulary");
    const char* embedding = static_cast<const char*>(model.tok_embeddings) + tokens[row] * model.dim * bytes;
    std::memcpy(at.h + row * model.dim * bytes, embedding, static_cast<std::size_t>(model.dim * bytes));
  }
  for (std::int64_t i = 0; i < model.n_layer; ++i) {
    StepLayer layer;
    std::memcpy(&layer, words + sizeof(StepModel) / 8 + i * (sizeof(StepLayer) / 8), sizeof layer);
    char* keys = static_cast<char*>(model.kv) + i * model.layer_stride * cache_bytes;
    float16* k_scale = model.scales == nullptr ? nullptr : model.scales + i * model.scale_layer_stride;
    float16* v_scale = model.scales == nullptr ? nullptr : k_scale + model.scale_value_offset;

    Linear qkv = layer_call(model, norm_eps, rows, model.dim, qkv_dim, layer.wqkv, at.h, at.qkv);
    qkv.norm_weight = layer.attention_norm;
    linear(qkv);

    attend(DecodeAttention{rows,
                           model.n_head,
                           model.n_kv_head,
                           head_dim,
                           static_cast<Dtype>(model.dtype),
                           at.qkv,
                           qkv_dim,
                           keys,
                           keys + model.value_offset * cache_bytes,
                           model.num_slots,
                           model.num_entries,
                           model.slot_stride,
                           model.head_stride,
                           model.entry_stride,
                           k_scale,
                           v_scale,
                           model.scale_slot_stride,
                           model.scale_head_stride,
                           model.prefix_bias,
                           slots,
                           positions,
                           model.rope,
                           at.attended});

    Linear wo = layer_call(model, norm_eps, rows, model.dim, model.dim, layer.wo, at.attended, at.h);
    wo.residual = at.h;
    linear(wo);

    Linear up = layer_call(model, norm_eps, rows, model.dim, model.ffn_dim, layer.w1, at.h, at.ffn);
    up.norm_weight = layer.ffn_norm;
    up.gate = layer.w3.data;
    up.gate_scales = layer.w3.scales;
    linear(up);

    Linear down = layer_call(model, norm_eps, rows, model.ffn_dim, model.dim, layer.w2, at.ffn, at.h);
    down.residual = at.h;
    linear(down);
  }
  Linear head = layer_call(model, norm_eps, rows, model.dim, model.vocab_size, model.output, at.h, logits);
  head.norm_weight = model.norm;
  head.output = Dtype::f32;
  linear(head);
}

}  // namespace gear::cpu
