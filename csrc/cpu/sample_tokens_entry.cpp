#include "cpu/sample_tokens.h"

namespace gear::cpu {

void sample(const SampleTokens& call) { GEAR_DISPATCH(sample)(call); }

void sample_tokens(std::int64_t images, std::int64_t vocab_size, const float* logits, const std::int64_t* uncond_rows,
                   const float* cfg_scale, const float* temperature, const std::int64_t* top_k, const float* top_p,
                   const bool* greedy, const float* noise, const std::int64_t* seeds, const std::int64_t* positions,
                   const bool* draws, std::int64_t* tokens) {
  sample(SampleTokens{images, vocab_size, logits, uncond_rows, cfg_scale, temperature, top_k, top_p, greedy, noise,
                      seeds, positions, draws, tokens});
}

void philox_noise(std::int64_t seed, std::int64_t position, std::int64_t vocab_size, float* q) {
  GEAR_DISPATCH(philox_noise)(seed, position, 0, vocab_size, q);
}

}  // namespace gear::cpu
