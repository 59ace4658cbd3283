#include "cuda/sample_tokens.h"

#include <algorithm>
#include <cmath>

#include "common/exponential.h"
#include "common/philox.h"
#include "common/threshold_search.h"
#include "device.h"
#include "emulated.h"

namespace {

using namespace gear;
using gear::emulated::check;
using gear::emulated::Device;
using gear::emulated::normal;

std::vector<float> rounded(std::size_t n, unsigned seed) {
  std::vector<float> values = normal(n, seed);
  for (float& x : values) x = std::round(x * 16.0f) / 8.0f;  // with ties
  return values;
}

// Three images: one drawn by Philox under guidance with both filters, one greedy, one that does not draw.
void sample(std::int64_t n) {
  const std::vector<float> logits = rounded(4 * n, 1);
  const Device<float> logits_at(logits), scale({3.0f, 1.0f, 1.0f}), temperature({0.8f, 1.0f, 1.0f}),
      top_p({0.7f, 1.0f, 1.0f});
  const Device<std::int64_t> uncond({3, -1, -1}), top_k({n / 2, n, n}), seeds({77, 0, 0}), positions({2, 1, 0}),
      slots({1, 0, -1}), tokens_at({-5, -5, -5}), table_at(std::vector<std::int64_t>(6, -5));
  const Device<unsigned char> greedy({0, 1, 1}), draws({1, 1, 0});  // bool
  gear::emulated::arrive_late(logits_at, logits.size());
  cuda::sample_tokens(3, n, logits_at.data(), n, uncond.data(), scale.data(), temperature.data(), top_k.data(),
                      top_p.data(), reinterpret_cast<const bool*>(greedy.data()), nullptr, seeds.data(),
                      positions.data(), reinterpret_cast<const bool*>(draws.data()), tokens_at.data(), table_at.data(),
                      3, slots.data(), nullptr);
  const std::vector<std::int64_t> tokens = tokens_at.values(), table = table_at.values();
  std::vector<float> scores(n);
  for (std::int64_t v = 0; v < n; ++v) {
    const float u = logits[3 * n + v];
    scores[v] = (u + (logits[v] - u) * 3.0f) / 0.8f;
  }
  std::vector<int> order(n);
  for (int v = 0; v < n; ++v) order[v] = v;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
  const float limit = scores[order[n / 2 - 1]];
  double total = 0.0, before = 0.0;
  for (const float x : scores) total += x >= limit ? std::exp(double{x} - scores[order[0]]) : 0.0;
  double best = -1.0;
  std::int64_t winner = 0;
  for (const int v : order) {
    if (scores[v] < limit || before > 0.7) break;
    const double p = std::exp(double{scores[v]} - scores[order[0]]) / total;
    const float q = exponential(unit_uniform(philox_tokens(77, 2, static_cast<std::uint32_t>(v / 4)).word[v % 4]));
    if (p / q > best) best = p / q, winner = v;
    before += p;
  }
  check(tokens[0] == winner, "drawn token");
  check(tokens[1] == std::max_element(&logits[n], &logits[2 * n]) - &logits[n], "greedy token");
  check(tokens[2] == 0, "an image that does not draw");
  check(table == std::vector<std::int64_t>({-5, tokens[1], -5, -5, -5, tokens[0]}), "token table");
}

void thresholds() {
  const std::vector<float> values{-2.5f, 0.0f, -0.0f, 3.0f, 1e-30f, 3.0f, -1e30f};
  for (const float a : values) {
    check(key_value(order_key(a)) == a, "a key's value");
    for (const float b : values) check((order_key(a) < order_key(b)) == (a < b), "order of keys");
  }
  std::vector<float> sorted = values;
  std::sort(sorted.begin(), sorted.end(), [](float a, float b) { return a > b; });
  for (int k = 1; k <= 7; ++k) {
    const auto reached = [&](std::uint32_t key) {
      return std::count_if(values.begin(), values.end(), [&](float x) { return order_key(x) >= key; });
    };
    check(key_value(largest_key([&](std::uint32_t key) { return reached(key) >= k; })) == sorted[k - 1],
          "k-th largest");
    const std::uint32_t above = smallest_key([&](std::uint32_t key) { return key == ~0u || reached(key + 1) < k; });
    check(key_value(above) == sorted[k - 1], "smallest with fewer than k above");
  }
  check(largest_key([](std::uint32_t) { return false; }) == 0, "nothing holds");
  check(smallest_key([](std::uint32_t) { return false; }) == ~0u, "nothing holds");
  check(kept_ties(0.25, 0.25f, 5, 0.5f) == 2, "the first over the limit stays");
  check(kept_ties(0.5, 0.0f, 5, 0.5f) == 5 && kept_ties(0.6, 0.1f, 5, 0.5f) == 0, "ties of no weight; over before");
}

}  // namespace

GEAR_CASE(sample_tokens) { sample(1100); }

GEAR_CASE(threshold_search) { thresholds(); }
