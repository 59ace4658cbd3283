#include "cpu/decode_steps.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/decode_step.h"
#include "cpu/sample_tokens.h"

namespace gear::cpu {
namespace {

using Indices = std::vector<std::int64_t>;

// The image of every row: image b's are rows b and uncond_rows[b].
Indices owners(std::int64_t rows, std::int64_t images, const std::int64_t* uncond_rows) {
  if (images > rows) throw std::out_of_range("there are fewer rows than images");
  Indices owner(static_cast<std::size_t>(rows), -1);
  for (std::int64_t image = 0; image < images; ++image) owner[image] = image;
  for (std::int64_t image = 0; image < images; ++image) {
    const std::int64_t row = uncond_rows[image];
    if (row == -1) continue;
    if (row < images || row >= rows || owner[row] != -1) throw std::out_of_range("an unconditional row does not exist");
    owner[row] = image;
  }
  for (const std::int64_t image : owner)
    if (image == -1) throw std::out_of_range("a row belongs to no image");
  return owner;
}

bool all_finite(const float* x, std::int64_t n) {
  constexpr std::uint32_t kExponent = 0x7f800000u;
  std::uint32_t found = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    found |= (bits & kExponent) == kExponent ? 1u : 0u;
  }
  return found == 0;
}

}  // namespace

std::pair<std::int64_t, bool> decode_steps(const std::int64_t* words, float norm_eps, std::int64_t steps,
                                           double seconds, std::int64_t rows, const std::int64_t* slots,
                                           std::int64_t* tokens, std::int64_t num_token_rows, std::int64_t max_tokens,
                                           std::int64_t images, const std::int64_t* token_rows,
                                           const std::int64_t* positions, const std::int64_t* uncond_rows,
                                           const float* cfg_scale, const float* temperature, const std::int64_t* top_k,
                                           const float* top_p, const bool* greedy, const std::int64_t* seeds,
                                           TorchGenerator* generator) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  StepModel model;
  std::memcpy(&model, words, sizeof model);
  const Indices owner = owners(rows, images, uncond_rows);
  for (std::int64_t row = 0; row < rows; ++row)
    if (slots[row] < 0 || slots[row] >= model.num_slots) throw std::out_of_range("a slot is not in the cache");
  for (std::int64_t image = 0; image < images; ++image) {
    if (token_rows[image] < 0 || token_rows[image] >= num_token_rows)
      throw std::out_of_range("a row of tokens is not in their table");
    // The last step feeds the token at position + steps - 2, into the cache's entry after that.
    if (positions[image] < 1 || positions[image] > max_tokens - steps || positions[image] > model.num_entries - steps)
      throw std::out_of_range("a position is not in the cache or the table of tokens");
  }

  const std::int64_t draws = images * model.vocab_size;
  const std::unique_ptr<float[]> logits(new float[static_cast<std::size_t>(rows * model.vocab_size)]);
  // Argmaxes alone draw nothing, as the official order has it; one image that draws draws for all.
  const bool from_torch = seeds == nullptr && std::count(greedy, greedy + images, false) > 0;
  const std::unique_ptr<float[]> noise(from_torch ? new float[static_cast<std::size_t>(draws)] : nullptr);
  Indices position(positions, positions + images), fed(owner.size()), token(owner.size()), drawn(position.size());
  const auto entry = [&](std::int64_t image) { return tokens + token_rows[image] * max_tokens + position[image]; };
  std::int64_t made = 0;
  bool finite = true;
  while (rows > 0 && made < steps) {
    for (std::int64_t row = 0; row < rows; ++row) {
      fed[row] = position[owner[row]] - 1;
      token[row] = entry(owner[row])[-1];
    }
    decode_step(words, norm_eps, rows, token.data(), slots, fed.data(), logits.get());
    if (from_torch) torch_exponential(generator, draws, noise.get());
    sample(SampleTokens{images, model.vocab_size, logits.get(), uncond_rows, cfg_scale, temperature, top_k, top_p,
                        greedy, noise.get(), seeds, position.data(), nullptr, drawn.data()});
    for (std::int64_t image = 0; image < images; ++image) {
      *entry(image) = drawn[image];
      ++position[image];
    }
    finite = all_finite(logits.get(), rows * model.vocab_size) && finite;
    ++made;
    if (std::chrono::duration<double>(Clock::now() - start).count() >= seconds) break;
  }
  return {made, finite};
}

}  // namespace gear::cpu
