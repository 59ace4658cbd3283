// Guidance, temperature, exact top-k and top-p without a sort, and the draw: one block per image.
//
// State: run under the CPU emulation only (tests/csrc/cuda_emulation.h), not on hardware yet.
//
// A row of up to 16384 tokens stays in the block, 16 tokens to a thread: as keys of the logits' order in registers, and
// weights exp(score - max) in shared memory, 64 KB. A longer one is computed again from the logits wherever it is
// needed. Thresholds are found bit by bit (common/threshold_search.h), a count or a sum over the block per bit.
// Weights, noise and the order of ties are those of the CPU kernel, so that both draw the same token from the same
// logits. A block's sums are doubles, added in an order that depends on the vocabulary's size alone. The idea of
// filtering without a sort is FlashInfer's.
#include "cuda/sample_tokens.h"

#include <cstdint>

#include "common/exp.h"
#include "common/exponential.h"
#include "common/philox.h"
#include "common/threshold_search.h"
#include "cuda/elements.cuh"
#include "cuda/platform.cuh"

namespace gear::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kPerThread = 16;

struct Sample {
  int vocab_size;
  const float* logits;
  std::int64_t logits_stride;
  const std::int64_t* uncond_rows;
  const float* cfg_scale;
  const float* temperature;
  const std::int64_t* top_k;
  const float* top_p;
  const bool* greedy;
  const float* noise;
  const std::int64_t* seeds;
  const std::int64_t* positions;
  const bool* draws;
  std::int64_t* tokens;
  std::int64_t* table;
  std::int64_t table_stride;
  const std::int64_t* draw_slots;
};

struct Shared {
  double sums[2][32];
  float values[2][32];
  int indices[32];
};

// Sums and maxima over the block, the same in all its threads. Two buffers take turns, so that one barrier each is
// enough.
class Block {
 public:
  __device__ explicit Block(Shared& shared) : shared_(shared) {}

  template <class T>
  __device__ T sum(T mine) {
    mine = warp_sum(mine);
    double* buffer = shared_.sums[turn_];
    turn_ ^= 1;
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = static_cast<double>(mine);
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return static_cast<T>(warp_sum(lane < blockDim.x / 32 ? buffer[lane] : 0.0));
  }

  __device__ float max(float mine) {
    mine = warp_max(mine);
    float* buffer = shared_.values[turn_];
    turn_ ^= 1;
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = mine;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return warp_max(lane < blockDim.x / 32 ? buffer[lane] : buffer[0]);
  }

  // The lowest index of the largest value.
  __device__ int best(float value, int index) {
    better_of_warp(value, index);
    float* buffer = shared_.values[turn_];
    turn_ ^= 1;
    if (threadIdx.x % 32 == 0) {
      buffer[threadIdx.x / 32] = value;
      shared_.indices[threadIdx.x / 32] = index;
    }
    __syncthreads();
    const int lane = threadIdx.x % 32 < blockDim.x / 32 ? threadIdx.x % 32 : 0;
    value = buffer[lane];
    index = shared_.indices[lane];
    better_of_warp(value, index);
    return index;
  }

 private:
  __device__ static void better_of_warp(float& value, int& index) {
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, value, distance);
      const int other_index = __shfl_xor_sync(0xffffffffu, index, distance);
      if (other > value || (other == value && other_index < index)) {
        value = other;
        index = other_index;
      }
    }
  }

  Shared& shared_;
  int turn_ = 0;
};

// An image's tokens, of which this thread holds quads threadIdx.x, threadIdx.x + blockDim.x …
template <bool kResident>
class Row {
 public:
  __device__ Row(const Sample& call, int image)
      : n_(call.vocab_size),
        cond_(call.logits + image * call.logits_stride),
        scale_(call.cfg_scale[image]),
        temperature_(call.temperature[image]) {
    const std::int64_t uncond_row = call.uncond_rows[image];
    uncond_ = uncond_row < 0 ? nullptr : call.logits + uncond_row * call.logits_stride;
    if constexpr (kResident) {
      weights_ = dynamic_shared<float>();
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) keys_[i] = token_of(i) < n_ ? order_key(score(token_of(i))) : 0;
    }
  }

  // From now on weights are exp(score - max).
  __device__ void weigh(float max) {
    max_ = max;
    divisor_ = 1.0f;
    if constexpr (kResident) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        if (token_of(i) < n_) weights_[token_of(i)] = exp_fp32(key_value(keys_[i]) - max);
    }
  }

  // From now on weights are divided by `divisor`.
  __device__ void divide(float divisor) {
    divisor_ = divisor;
    if constexpr (kResident) {
      for (int i = 0; i < kPerThread; ++i)
        if (token_of(i) < n_) weights_[token_of(i)] = weights_[token_of(i)] / divisor;
    }
  }

  // visit(token, key, weight) for each of this thread's tokens, ascending.
  template <class Visit>
  __device__ void each(Visit visit) const {
    if constexpr (kResident) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        if (token_of(i) < n_) visit(token_of(i), keys_[i], weights_[token_of(i)]);
    } else {
      for (int quad = threadIdx.x; 4 * quad < n_; quad += blockDim.x) {
        for (int token = 4 * quad; token < 4 * quad + 4 && token < n_; ++token) {
          const float x = score(token);
          visit(token, order_key(x), exp_fp32(x - max_) / divisor_);
        }
      }
    }
  }

  // visit(key) likewise; before there are weights, too.
  template <class Visit>
  __device__ void each_key(Visit visit) const {
    if constexpr (kResident) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        if (token_of(i) < n_) visit(keys_[i]);
    } else {
      each([&](int, std::uint32_t key, float) { visit(key); });
    }
  }

  // visit(token, weight) likewise, with weight 0 for tokens that are not kept; four by four.
  template <class IsKept, class Visit>
  __device__ void each_kept(IsKept is_kept, Visit visit) {
    if constexpr (kResident) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        if (token_of(i) < n_ && !is_kept(token_of(i), keys_[i])) weights_[token_of(i)] = 0.0f;
#pragma unroll 1
      for (int quad = threadIdx.x; 4 * quad < n_; quad += blockDim.x)
        for (int token = 4 * quad; token < 4 * quad + 4 && token < n_; ++token) visit(token, weights_[token]);
    } else {
      each([&](int token, std::uint32_t key, float weight) { visit(token, is_kept(token, key) ? weight : 0.0f); });
    }
  }

 private:
  __device__ static int token_of(int i) { return 4 * (threadIdx.x + blockDim.x * (i / 4)) + i % 4; }

  // Steps 1 and 2. Not __ldg: its cache is for memory that nobody writes while the grid is there, and the kernel before
  // this one writes the logits after the grid has started.
  __device__ float score(int token) const {
    float x = __ldcg(cond_ + token);
    if (uncond_ != nullptr) {
      const float u = __ldcg(uncond_ + token);
      x = u + (x - u) * scale_;
    }
    return x / temperature_;
  }

  int n_;
  const float* cond_;
  const float* uncond_;
  float scale_, temperature_, max_ = 0.0f, divisor_ = 1.0f;
  std::uint32_t keys_[kResident ? kPerThread : 1];
  float* weights_ = nullptr;
};

// The tokens that are left: those at or above `lowest`; of the ones at `last`, those before `limit`.
struct Kept {
  std::uint32_t lowest = 0, last = 0;
  int limit = 0x7fffffff;
  __device__ bool operator()(int token, std::uint32_t key) const {
    return key >= lowest && (key > last || (key == last && token < limit));
  }
};

// Step 3: the k-th largest key.
template <class Tokens>
__device__ std::uint32_t kth_largest(const Tokens& row, Block& block, std::int64_t k) {
  return largest_key([&](std::uint32_t candidate) {
    int reached = 0;
    row.each_key([&](std::uint32_t key) { reached += key >= candidate ? 1 : 0; });
    return block.sum(reached) >= k;
  });
}

// Step 4; the row's weights are exp(score - max) before and after.
template <class Tokens>
__device__ void keep_top_p(Tokens& row, Block& block, float max, float top_p, Kept& kept) {
  double mine = 0.0;
  row.each([&](int, std::uint32_t key, float w) { mine += key >= kept.lowest ? static_cast<double>(w) : 0.0; });
  row.divide(static_cast<float>(block.sum(mine)));
  const auto mass_above = [&](std::uint32_t bound) {
    double mass = 0.0;
    row.each([&](int, std::uint32_t key, float p) {
      mass += key > bound && key >= kept.lowest ? static_cast<double>(p) : 0.0;
    });
    return block.sum(mass);
  };
  // The smallest key with at most p above it is the last that is kept, in whole or in part.
  const std::uint32_t last =
      smallest_key([&](std::uint32_t candidate) { return static_cast<float>(mass_above(candidate)) <= top_p; });
  const double before = mass_above(last);
  int ties = 0;
  float probability = 0.0f;
  row.each([&](int, std::uint32_t key, float p) {
    if (key == last && key >= kept.lowest) {
      ++ties;
      probability = p;
    }
  });
  ties = block.sum(ties);
  probability = block.max(probability);
  const int stay = kept_ties(before, probability, ties, top_p);
  kept.last = last;
  if (stay < ties) {
    // The first `stay` in index order: the largest bound with no more of them before it.
    kept.limit = static_cast<int>(largest_key([&](std::uint32_t bound) {
      int found = 0;
      row.each([&](int token, std::uint32_t key, float) {
        found += key == last && static_cast<std::uint32_t>(token) < bound ? 1 : 0;
      });
      return bound <= 0x7fffffffu && block.sum(found) <= stay;
    }));
  }
  row.weigh(max);
}

template <bool kResident>
__global__ void __launch_bounds__(kMaxThreads) sample_kernel(const Sample call) {
  __shared__ Shared shared;
  const int image = blockIdx.x;
  dependency_launch();
  dependency_wait();
  if (call.draws != nullptr && !call.draws[image]) {
    if (threadIdx.x == 0) call.tokens[image] = 0;
    return;
  }
  Block block(shared);

  // Phase 1: scores, their maximum, and weights.
  Row<kResident> row(call, image);
  float max = -__int_as_float(0x7f800000);
  row.each_key([&](std::uint32_t key) { max = fmaxf(max, key_value(key)); });
  max = block.max(max);
  row.weigh(max);

  // Phase 2: what top-k and top-p leave.
  Kept kept;
  if (call.top_k[image] < call.vocab_size) kept.lowest = kth_largest(row, block, call.top_k[image]);
  if (call.top_p[image] < 1.0f) keep_top_p(row, block, max, call.top_p[image], kept);

  // Phase 3: an exponential race, or the largest weight; the lowest index of a tie. A dropped token's ratio is 0.
  const bool greedy = call.greedy[image];
  const float* noise =
      call.noise == nullptr ? nullptr : call.noise + static_cast<std::int64_t>(image) * call.vocab_size;
  const bool philox = !greedy && noise == nullptr;
  const std::uint64_t seed = philox ? static_cast<std::uint64_t>(call.seeds[image]) : 0;
  const std::uint32_t position = philox ? static_cast<std::uint32_t>(call.positions[image]) : 0;
  float best = -1.0f;
  int index = 0, drawn_quad = -1;
  PhiloxWords words{};
  row.each_kept(kept, [&](int token, float weight) {
    float ratio = weight;
    if (ratio > 0.0f && philox) {
      if (drawn_quad != token / 4) words = philox_tokens(seed, position, static_cast<std::uint32_t>(token) / 4);
      drawn_quad = token / 4;
      const int lane = token % 4;
      ratio = ratio / exponential(unit_uniform(lane == 0   ? words.word[0]
                                               : lane == 1 ? words.word[1]
                                               : lane == 2 ? words.word[2]
                                                           : words.word[3]));
    } else if (!greedy && noise != nullptr) {
      ratio = ratio / noise[token];
    }
    if (ratio > best) {
      best = ratio;
      index = token;
    }
  });
  index = block.best(best, index);
  if (threadIdx.x == 0) {
    call.tokens[image] = index;
    if (call.table != nullptr) call.table[call.draw_slots[image] * call.table_stride + call.positions[image]] = index;
  }
}

}  // namespace

void sample_tokens(std::int64_t images, std::int64_t vocab_size, const float* logits, std::int64_t logits_stride,
                   const std::int64_t* uncond_rows, const float* cfg_scale, const float* temperature,
                   const std::int64_t* top_k, const float* top_p, const bool* greedy, const float* noise,
                   const std::int64_t* seeds, const std::int64_t* positions, const bool* draws, std::int64_t* tokens,
                   std::int64_t* table, std::int64_t table_stride, const std::int64_t* draw_slots, void* stream) {
  if (images == 0) return;
  const Sample call{static_cast<int>(vocab_size),
                    logits,
                    logits_stride,
                    uncond_rows,
                    cfg_scale,
                    temperature,
                    top_k,
                    top_p,
                    greedy,
                    noise,
                    seeds,
                    positions,
                    draws,
                    tokens,
                    table,
                    table_stride,
                    draw_slots};
  const std::int64_t needed = (vocab_size + kPerThread - 1) / kPerThread, warps = (needed + 31) / 32;
  const bool resident = warps <= kMaxThreads / 32;
  const Launch at{static_cast<unsigned>(images), static_cast<unsigned>(resident ? 32 * warps : kMaxThreads),
                  resident ? static_cast<std::size_t>(vocab_size) * sizeof(float) : 0, stream, true};
  launch("sample_tokens", at, resident ? sample_kernel<true> : sample_kernel<false>, call);
}

}  // namespace gear::cuda
