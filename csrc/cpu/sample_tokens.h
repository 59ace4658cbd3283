// One token per image from its logits; see ops/sample_tokens.py.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gear {

// The settings of one image; arrays below hold one entry per image.
struct SampleTokens {
  std::int64_t images, vocab_size;
  const float* logits;              // (rows, vocab_size); row b is image b's conditional row
  const std::int64_t* uncond_rows;  // row of the unconditional half, -1 without guidance
  const float* cfg_scale;
  const float* temperature;
  const std::int64_t* top_k;  // in [1, vocab_size]
  const float* top_p;         // in (0, 1]
  const bool* greedy;
  const float* noise;             // (images, vocab_size), or null for Philox
  const std::int64_t* seeds;      // Philox only
  const std::int64_t* positions;  // Philox only
  const bool* draws;              // images that draw; the others get token 0. Null: all
  std::int64_t* tokens;           // out
};

namespace cpu {

void sample(const SampleTokens& call);

void sample_tokens(std::int64_t images, std::int64_t vocab_size, const float* logits, const std::int64_t* uncond_rows,
                   const float* cfg_scale, const float* temperature, const std::int64_t* top_k, const float* top_p,
                   const bool* greedy, const float* noise, const std::int64_t* seeds, const std::int64_t* positions,
                   const bool* draws, std::int64_t* tokens);

// q[0 … vocab_size) of one (seed, position).
void philox_noise(std::int64_t seed, std::int64_t position, std::int64_t vocab_size, float* q);

}  // namespace cpu
}  // namespace gear

GEAR_DECLARE_ISA(void, sample, (const SampleTokens& call))
GEAR_DECLARE_ISA(void, philox_noise,
                 (std::int64_t seed, std::int64_t position, std::int64_t first, std::int64_t n, float* q))
