// Threaded ops under concurrent callers, for ThreadSanitizer (`make tsan`), which Python itself is not built for.
//
// Several threads call each op at once with pools of changing size; every result must equal the one of a single thread.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "cpu/codebook_quantize.h"
#include "cpu/decode_attention.h"
#include "cpu/parallel.h"
#include "cpu/skinny_linear.h"

namespace {

std::vector<float> normal(size_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(n);
  for (float& x : values) x = distribution(engine);
  return values;
}

std::vector<float> quantize(int metric) {
  constexpr int64_t n = 500, k = 1000, d = 8;
  const auto z = normal(n * d, 1), e = normal(k * d, 2);
  std::vector<float> z2(n), e2(k), quantized(n * d), result;
  for (int64_t i = 0; i < n * d; ++i) z2[i / d] += z[i] * z[i];
  for (int64_t i = 0; i < k * d; ++i) e2[i / d] += e[i] * e[i];
  std::vector<int64_t> indices(n);
  gear::cpu::codebook_quantize(z.data(), z2.data(), e.data(), e2.data(), n, k, d, metric, indices.data(),
                               quantized.data());
  result = quantized;
  for (const int64_t index : indices) result.push_back(static_cast<float>(index));
  return result;
}

std::vector<float> linear() {
  constexpr int64_t rows = 3, in = 200, out = 333;
  const auto x = normal(rows * in, 3), weight = normal(out * in, 4), gate = normal(out * in, 5);
  std::vector<float> y(rows * out);
  gear::cpu::skinny_linear(x.data(), 0, rows, in, out, nullptr, 1e-5f, 0, weight.data(), nullptr, gate.data(), nullptr,
                           nullptr, y.data());
  return y;
}

std::vector<float> attention() {
  constexpr int64_t rows = 4, heads = 6, kv_heads = 2, head_dim = 20, entries = 160;
  const auto qkv = normal(rows * (heads + 2 * kv_heads) * head_dim, 6);
  auto keys = normal(rows * kv_heads * entries * head_dim, 7), values = normal(rows * kv_heads * entries * head_dim, 8);
  const auto rope = normal(entries * head_dim, 9);
  const std::vector<float> bias(rows, 0.5f);
  const std::vector<int64_t> slots{2, 0, 3, 1}, positions{0, 70, 140, 5};
  std::vector<float> out(rows * heads * head_dim);
  gear::cpu::decode_attention(qkv.data(), 0, (heads + 2 * kv_heads) * head_dim, rows, heads, kv_heads, head_dim,
                              keys.data(), values.data(), rows, entries, kv_heads * entries * head_dim,
                              entries * head_dim, head_dim, bias.data(), slots.data(), positions.data(), rope.data(),
                              out.data());
  return out;
}

bool same_from_every_thread(const char* name, const std::function<std::vector<float>()>& run) {
  gear::set_num_threads(1);
  const std::vector<float> expected = run();
  bool equal = true;
  for (const int pool : {2, 5}) {
    gear::set_num_threads(pool);
    for (int round = 0; round < 5; ++round) {
      std::vector<std::vector<float>> found(3);
      std::vector<std::thread> callers;
      for (auto& result : found) callers.emplace_back([&run, &result] { result = run(); });
      for (std::thread& caller : callers) caller.join();
      for (const auto& result : found) equal = equal && result == expected;
    }
  }
  std::printf("%-20s %s\n", name, equal ? "equal from every thread" : "DIFFERS");
  return equal;
}

}  // namespace

int main() {
  bool equal = true;
  equal &= same_from_every_thread("codebook_quantize l2", [] { return quantize(0); });
  equal &= same_from_every_thread("codebook_quantize ip", [] { return quantize(1); });
  equal &= same_from_every_thread("skinny_linear", linear);
  equal &= same_from_every_thread("decode_attention", attention);
  return equal ? EXIT_SUCCESS : EXIT_FAILURE;
}
