#include "cuda/decode_attention.h"

#include <cmath>
#include <cstring>

#include "common/attention_chunks.h"
#include "common/narrow_floats.h"
#include "device.h"
#include "emulated.h"

namespace {

using namespace gear;
using gear::emulated::check;
using gear::emulated::Device;
using gear::emulated::normal;

// Two rows of two heads over one key/value head; the second row is inert.
template <class T>
void attend(int dtype, std::int64_t splits) {
  constexpr std::int64_t heads = 2, d = 12, padded = 16, entries = 72, slots_ = 2, position = 68;
  const std::vector<float> wide = normal(2 * (heads + 2) * d, 1), rope = normal(entries * d, 2);
  const std::vector<float> cached = normal(2 * slots_ * entries * padded, 3);
  std::vector<T> qkv, cached_before;
  for (const float x : wide) qkv.push_back(from_float<T>(x));
  for (const float x : cached) cached_before.push_back(from_float<T>(x));
  const std::vector<float> prefix_bias{0.0f, 1.5f};
  const std::int64_t chunks = chunk_count(entries);
  const Device<T> qkv_at(qkv), cache_at(cached_before), out_at(2 * heads * d);
  const Device<float> bias(prefix_bias), rope_at(rope), stored(2 * heads * chunks * (d + 2));
  const Device<std::int64_t> slots({1, -1}), positions({position, 0});
  const Device<int> arrived(std::vector<int>(2 * heads));
  gear::emulated::arrive_late(qkv_at, qkv.size());
  cuda::decode_attention(qkv_at.data(), dtype, (heads + 2) * d, 2, heads, 1, d, cache_at.data(),
                         cache_at.data() + slots_ * entries * padded, dtype, slots_, entries, entries * padded,
                         entries * padded, padded, nullptr, nullptr, 0, 0, bias.data(), slots.data(), positions.data(),
                         rope_at.data(), out_at.data(), splits, stored.data(), arrived.data(), nullptr);
  const std::vector<T> out = out_at.values(), cache = cache_at.values();
  const T* key_rows = cache.data() + entries * padded;
  const T* value_rows = key_rows + slots_ * entries * padded;
  for (std::int64_t i = 0; i < d; ++i)
    check(to_float(value_rows[(position + 1) * padded + i]) == to_float(qkv[(heads + 1) * d + i]), "value written");
  for (std::int64_t h = 0; h < heads; ++h) {
    std::vector<double> q(d), sums(d);
    for (std::int64_t i = 0; i < d; i += 2) {
      const double even = to_float(qkv[h * d + i]), odd = to_float(qkv[h * d + i + 1]);
      const double cos = rope[position * d + i], sin = rope[position * d + i + 1];
      q[i] = even * cos - odd * sin;
      q[i + 1] = odd * cos + even * sin;
    }
    double total = 0.0;
    for (std::int64_t j = 0; j < position + 2; ++j) {
      double score = 0.0;
      for (std::int64_t i = 0; i < d; ++i) score += q[i] * to_float(key_rows[j * padded + i]);
      const double weight = std::exp(j == 0 ? double{prefix_bias[1]} : score / std::sqrt(double{d}));
      total += weight;
      for (std::int64_t i = 0; i < d; ++i) sums[i] += weight * to_float(value_rows[j * padded + i]);
    }
    for (std::int64_t i = 0; i < d; ++i) {
      check(std::fabs(to_float(out[h * d + i]) - sums[i] / total) < (sizeof(T) == 4 ? 1e-4 : 4e-2), "attention");
      check(to_float(out[(heads + h) * d + i]) == 0.0f, "an inert row gives zeros");
    }
  }
  for (const int count : arrived.values()) check(count == 0, "arrivals are left at zero");
}

// A state that is merged in order equals one softmax over everything.
void merges() {
  const std::vector<float> scores = normal(200, 4);
  SoftmaxState state{};
  float value = 0.0f;
  for (int chunk = 0; chunk < chunk_count(200); ++chunk) {
    SoftmaxState found{-1e30f, 0.0f};
    const int last = (chunk + 1) * kChunkEntries < 200 ? (chunk + 1) * kChunkEntries : 200;
    float part = 0.0f;
    for (int i = chunk * kChunkEntries; i < last; ++i) found.max = std::fmax(found.max, 20.0f * scores[i]);
    for (int i = chunk * kChunkEntries; i < last; ++i) {
      const float weight = exp_fp32(20.0f * scores[i] - found.max);
      found.sum += weight;
      part += weight * static_cast<float>(i);
    }
    if (chunk == 0) {
      state = found;
      value = part;
    } else {
      value = merge_value(merge_chunk(state, found), value, part);
    }
  }
  double sum = 0.0, expected = 0.0;
  for (int i = 0; i < 200; ++i) {
    sum += std::exp(20.0 * scores[i] - state.max);
    expected += std::exp(20.0 * scores[i] - state.max) * i;
  }
  check(std::fabs(state.sum / sum - 1.0) < 1e-5 && std::fabs(value / expected - 1.0) < 1e-5, "merged softmax");
  SoftmaxState absent{bits_float(-0x800000), 0.0f};
  const SoftmaxScales scales = merge_chunk(absent, {1.0f, 2.0f});
  check(scales.old_scale == 0.0f && scales.new_scale == 1.0f && absent.sum == 2.0f, "-inf weighs nothing");
  const float bits[] = {bits_float(0x7fc00000), bits_float(-0x400000)};
  for (const float none : bits) check(std::isnan(none) && std::isnan(exp_fp32(none)), "what is no number stays none");
}

void index_maps() {
  for (int shares = 1; shares <= 5; ++shares) {
    int found = 0;
    for (int share = 0; share < sharing_blocks(4, shares); ++share)
      for (int chunk = share; chunk < 4; chunk += shares, ++found)
        check(owner_of_chunk(chunk, shares) == share, "owner");
    check(found == 4, "every chunk has one block");
  }
  check(stored_chunk(1, 2, 3, 4, 5, 8) == ((1 * 4 + 2) * 5 + 3) * 10, "stored chunks");
  check(chunk_count(2) == 1 && chunk_count(64) == 1 && chunk_count(65) == 2, "chunks");
}

}  // namespace

GEAR_CASE(decode_attention) {
  attend<float>(0, 1);
  attend<bfloat16>(1, 2);
}

GEAR_CASE(attention_chunks) {
  merges();
  index_maps();
}
