// Guidance, temperature, exact top-k and top-p without sorting the vocabulary, and the draw.
//
// Both filters keep what lies above a threshold. Floats map to unsigned keys in the same order, and the threshold is
// found bit by bit: top-k asks how many keys reach a candidate, top-p how much probability lies above it. The
// candidate's own ties are all kept by top-k, and by top-p in index order until the sum first exceeds p, as a stable
// sort would have it. Probabilities are fp32; their sums are doubles over fixed lanes, rounded to fp32 when compared
// with p.
#include "cpu/sample_tokens.h"

#include "common/exponential.h"
#include "common/philox.h"
#include "common/threshold_search.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/skinny_linear.h"

namespace gear::GEAR_ISA {
namespace {

constexpr std::int64_t kBlock = 256;  // tokens that pass through the caches together
constexpr int kSums = 16;             // independent partial sums, joined in order

// Step 1 and 2: scores[v], and their maximum.
float score(const SampleTokens& call, std::int64_t image, float* scores) {
  const std::int64_t n = call.vocab_size, uncond_row = call.uncond_rows[image];
  const float* cond = call.logits + image * n;
  const float* uncond = uncond_row < 0 ? nullptr : call.logits + uncond_row * n;
  const Vec scale = splat(call.cfg_scale[image]), temperature = splat(call.temperature[image]);
  Vec top = splat(-__builtin_inff());
  std::int64_t v = 0;
  for (; v + kLanes <= n; v += kLanes) {
    Vec x = load(cond + v);
    if (uncond != nullptr) x = add(load(uncond + v), mul(sub(x, load(uncond + v)), scale));
    x = div(x, temperature);
    store(scores + v, x);
    top = max(top, x);
  }
  float best = max(top);
  for (; v < n; ++v) {
    float x = cond[v];
    if (uncond != nullptr) x = uncond[v] + (x - uncond[v]) * call.cfg_scale[image];
    x = x / call.temperature[image];
    scores[v] = x;
    best = best < x ? x : best;
  }
  return best;
}

std::uint32_t kth_largest(const std::uint32_t* keys, std::int64_t n, std::int64_t k) {
  return largest_key([=](std::uint32_t candidate) {
    std::int32_t reached = 0;
    for (std::int64_t v = 0; v < n; ++v) reached += keys[v] >= candidate ? 1 : 0;
    return reached >= k;
  });
}

double mass_above(const std::uint32_t* keys, const float* probabilities, std::int64_t n, std::uint32_t key) {
  double sums[kSums] = {};
  std::int64_t v = 0;
  for (; v + kSums <= n; v += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += static_cast<double>(keys[v + i] > key ? probabilities[v + i] : 0.0f);
  for (; v < n; ++v) sums[0] += static_cast<double>(keys[v] > key ? probabilities[v] : 0.0f);
  double total = 0.0;
  for (const double part : sums) total += part;
  return total;
}

// Step 4 on weights = exp(score - max), zero where top-k dropped: zeroes what top-p drops.
void keep_top_p(const std::uint32_t* keys, float* weights, float* probabilities, std::int64_t n, float top_p) {
  double sums[kSums] = {};
  for (std::int64_t v = 0; v < n; ++v) sums[v % kSums] += static_cast<double>(weights[v]);
  double total = 0.0;
  for (const double part : sums) total += part;
  const float normaliser = static_cast<float>(total);
  for (std::int64_t v = 0; v < n; ++v) probabilities[v] = weights[v] / normaliser;
  // The smallest key with at most p above it is the last that is kept, in whole or in part.
  const std::uint32_t last = smallest_key([=](std::uint32_t candidate) {
    return static_cast<float>(mass_above(keys, probabilities, n, candidate)) <= top_p;
  });
  double before = mass_above(keys, probabilities, n, last);
  for (std::int64_t v = 0; v < n; ++v) {
    if (keys[v] > last) continue;
    if (keys[v] < last || !(static_cast<float>(before) <= top_p)) {
      weights[v] = 0.0f;
    } else {
      before += static_cast<double>(probabilities[v]);
    }
  }
}

// weights[0 … n) = exp(scores - max).
void exponentiate(const float* scores, std::int64_t n, float max_score, float* weights) {
  std::int64_t v = 0;
  for (; v + kLanes <= n; v += kLanes) store(weights + v, exp(sub(load(scores + v), splat(max_score))));
  if (v < n) {
    float lanes[kLanes];
    store(lanes, exp(sub(load_first(scores + v, static_cast<int>(n - v)), splat(max_score))));
    for (std::int64_t i = 0; v + i < n; ++i) weights[v + i] = lanes[i];
  }
}

// The lowest index of the largest ratio; a ratio that is no number never wins.
struct Best {
  float value = -1.0f;
  std::int64_t index = 0;
};

void race(const float* weights, const float* noise, std::int64_t first, std::int64_t n, Best& best) {
  float ratios[kBlock];
  Vec top = splat(-1.0f);
  std::int64_t v = 0;
  for (; v + kLanes <= n; v += kLanes) {
    const Vec ratio = noise == nullptr ? load(weights + v) : div(load(weights + v), load(noise + v));
    store(ratios + v, ratio);
    top = max(ratio, top);
  }
  float largest = max(top);
  for (; v < n; ++v) {
    ratios[v] = noise == nullptr ? weights[v] : weights[v] / noise[v];
    if (ratios[v] > largest) largest = ratios[v];
  }
  if (!(largest > best.value)) return;
  for (v = 0; v < n; ++v) {
    if (ratios[v] == largest) {
      best = {largest, first + v};
      return;
    }
  }
}

void sample_one(const SampleTokens& call, std::int64_t image, float* memory) {
  const std::int64_t n = call.vocab_size, padded = (n + 63) / 64 * 64;
  float* scores = memory;
  float* weights = memory + padded;
  const float max_score = score(call, image, scores);
  const bool filter_k = call.top_k[image] < n, filter_p = call.top_p[image] < 1.0f;
  exponentiate(scores, n, max_score, weights);
  if (filter_k || filter_p) {
    auto* keys = reinterpret_cast<std::uint32_t*>(memory + 2 * padded);
    for (std::int64_t v = 0; v < n; ++v) keys[v] = order_key(scores[v]);
    if (filter_k) {
      const std::uint32_t threshold = kth_largest(keys, n, call.top_k[image]);
      for (std::int64_t v = 0; v < n; ++v) weights[v] = keys[v] >= threshold ? weights[v] : 0.0f;
    }
    if (filter_p) keep_top_p(keys, weights, scores, n, call.top_p[image]);
  }
  Best best;
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = n - first < kBlock ? n - first : kBlock;
    float drawn[kBlock];
    const float* noise = nullptr;
    if (!call.greedy[image]) {
      noise = call.noise != nullptr ? call.noise + image * n + first : drawn;
      if (noise == drawn) philox_noise(call.seeds[image], call.positions[image], first, count, drawn);
    }
    race(weights + first, noise, first, count, best);
  }
  call.tokens[image] = best.index;
}

}  // namespace

// `first` is a multiple of 4 and q has room for n.
void philox_noise(std::int64_t seed, std::int64_t position, std::int64_t first, std::int64_t n, float* q) {
  constexpr int kBlocks = static_cast<int>(kBlock) / 4;
  for (std::int64_t at = 0; at < n; at += kBlock) {
    std::uint32_t words[4][kBlocks];
    float u[kBlock], values[kBlock];
    for (int i = 0; i < kBlocks; ++i) {
      const PhiloxWords drawn = philox_tokens(static_cast<std::uint64_t>(seed), static_cast<std::uint32_t>(position),
                                              static_cast<std::uint32_t>((first + at) / 4 + i));
      for (int lane = 0; lane < 4; ++lane) words[lane][i] = drawn.word[lane];
    }
    for (int i = 0; i < kBlocks; ++i)
      for (int lane = 0; lane < 4; ++lane) u[4 * i + lane] = unit_uniform(words[lane][i]);
    for (int i = 0; i < kBlock; ++i) values[i] = exponential(u[i]);
    const std::int64_t count = n - at < kBlock ? n - at : kBlock;
    for (std::int64_t i = 0; i < count; ++i) q[at + i] = values[i];
  }
}

void sample(const SampleTokens& call) {
  const std::int64_t floats = 3 * ((call.vocab_size + 63) / 64 * 64);
  float* memory =
      static_cast<float*>(scratch(Scratch::sampler, static_cast<std::size_t>(call.images * floats) * sizeof(float)));
  parallel_for(call.images, [&](std::int64_t image) {
    if (call.draws == nullptr || call.draws[image]) {
      sample_one(call, image, memory + image * floats);
    } else {
      call.tokens[image] = 0;
    }
  });
}

}  // namespace gear::GEAR_ISA
