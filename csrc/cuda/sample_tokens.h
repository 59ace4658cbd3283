// One token per image from its logits; see ops/sample_tokens.py. Arguments as those of gear::cpu::sample_tokens.
#pragma once

#include <cstdint>

namespace gear::cuda {

// `logits` rows are `logits_stride` apart. With `table` the token of image b also goes to
// table[draw_slots[b] * table_stride + positions[b]], where the next step reads it; images that do not draw write
// nothing.
void sample_tokens(std::int64_t images, std::int64_t vocab_size, const float* logits, std::int64_t logits_stride,
                   const std::int64_t* uncond_rows, const float* cfg_scale, const float* temperature,
                   const std::int64_t* top_k, const float* top_p, const bool* greedy, const float* noise,
                   const std::int64_t* seeds, const std::int64_t* positions, const bool* draws, std::int64_t* tokens,
                   std::int64_t* table, std::int64_t table_stride, const std::int64_t* draw_slots, void* stream);

}  // namespace gear::cuda
