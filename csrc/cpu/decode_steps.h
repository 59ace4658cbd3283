// Several image tokens per row in one call: feed the tokens drawn last, decode_step, sample, keep the draws. A step
// leaves nothing but weights in the caches: Python between two steps costs a millisecond there. See
// ops/decode_steps.py.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/torch_exponential.h"

namespace gear::cpu {

// slots: (rows); token_rows, positions (of the tokens drawn first) and the settings: (images), as SampleTokens has
// them; tokens: (num_token_rows, max_tokens). Noise is Philox's under `seeds`; where these are null, that of torch's
// `generator`, which is left where the steps made left it. Stops after `steps` steps, or once `seconds` have passed.
// Returns the number of steps made, at least 1 unless there is nothing to do, and whether all logits were finite.
// Throws std::out_of_range, before anything is written, if an index of any step does not exist.
std::pair<std::int64_t, bool> decode_steps(const std::int64_t* model, float norm_eps, std::int64_t steps,
                                           double seconds, std::int64_t rows, const std::int64_t* slots,
                                           std::int64_t* tokens, std::int64_t num_token_rows, std::int64_t max_tokens,
                                           std::int64_t images, const std::int64_t* token_rows,
                                           const std::int64_t* positions, const std::int64_t* uncond_rows,
                                           const float* cfg_scale, const float* temperature, const std::int64_t* top_k,
                                           const float* top_p, const bool* greedy, const std::int64_t* seeds,
                                           TorchGenerator* generator);

}  // namespace gear::cpu
