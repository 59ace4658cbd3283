// Threaded ops under concurrent callers, for ThreadSanitizer (`make tsan`), which Python itself is not built for.
//
// Several threads call each op at once with pools of changing size; every result must equal the one of a single thread.
// Then tasks throw.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "common/packing.h"
#include "cpu/codebook_quantize.h"
#include "cpu/conv_rows.h"
#include "cpu/decode_attention.h"
#include "cpu/decode_step.h"
#include "cpu/decode_steps.h"
#include "cpu/dual_readout.h"
#include "cpu/group_norm_silu.h"
#include "cpu/parallel.h"
#include "cpu/residual_moments.h"
#include "cpu/sample_tokens.h"
#include "cpu/sign_bits.h"
#include "cpu/skinny_linear.h"
#include "cpu/soft_readout.h"
#include "cpu/torch_exponential.h"

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

// n random numbers of a cache: fp32, or e4m3 with a scale of 0.01 for each head.
struct CacheNumbers {
  std::vector<float> wide;
  std::vector<gear::float8> narrow;
  std::vector<gear::float16> scales;

  CacheNumbers(bool fp8, size_t n, size_t head_dim, unsigned seed) : wide(normal(n, seed)) {
    if (!fp8) return;
    for (const float x : wide) narrow.push_back(gear::from_float<gear::float8>(100 * x));
    scales.assign(n / head_dim, gear::from_float<gear::float16>(0.01f));
  }

  void* data() { return narrow.empty() ? static_cast<void*>(wide.data()) : narrow.data(); }
  gear::float16* scale_data() { return scales.empty() ? nullptr : scales.data(); }
};

std::vector<float> attention(bool fp8) {
  constexpr int64_t rows = 4, heads = 6, kv_heads = 2, head_dim = 20, entries = 160;
  const auto qkv = normal(rows * (heads + 2 * kv_heads) * head_dim, 6);
  CacheNumbers keys(fp8, rows * kv_heads * entries * head_dim, head_dim, 7);
  CacheNumbers values(fp8, rows * kv_heads * entries * head_dim, head_dim, 8);
  const auto rope = normal(entries * head_dim, 9);
  const std::vector<float> bias(rows, 0.5f);
  const std::vector<int64_t> slots{2, 0, 3, 1}, positions{0, 70, 140, 5};
  std::vector<float> out(rows * heads * head_dim);
  gear::cpu::decode_attention(qkv.data(), 0, (heads + 2 * kv_heads) * head_dim, rows, heads, kv_heads, head_dim,
                              keys.data(), values.data(), rows, entries, kv_heads * entries * head_dim,
                              entries * head_dim, head_dim, keys.scale_data(), values.scale_data(), kv_heads * entries,
                              entries, bias.data(), slots.data(), positions.data(), rope.data(), out.data());
  return out;
}

// Operands of the weights of a model; their storage lives as long as this does.
class Weights {
 public:
  explicit Weights(gear::WeightKind kind) : kind_(kind) {}

  gear::StepWeight make(int64_t out, int64_t in) {
    const auto values = normal(out * in, ++seed_);
    const float size = 1 / std::sqrt(static_cast<float>(in));
    const bool int8 = kind_ == gear::WeightKind::int8_panels;
    const int64_t bytes = int8 ? 1 : 2;
    std::vector<char> data(kind_ == gear::WeightKind::f32_rows
                               ? out * in * 4
                               : gear::packed_panels(out) * gear::packed_panel_bytes(in, bytes));
    for (int64_t i = 0; i < out * in; ++i) {
      const float value = values[i] * size;
      const int64_t place = gear::packed_index(i / in, i % in, in, bytes) * bytes;
      if (kind_ == gear::WeightKind::f32_rows) {
        std::memcpy(&data[i * 4], &value, 4);
      } else if (int8) {
        data[place] = static_cast<char>(static_cast<int8_t>(std::fmax(-127, std::fmin(127, values[i] * 30))));
      } else {
        std::memcpy(&data[place], reinterpret_cast<const char*>(&value) + 2, 2);  // the upper half is a bf16
      }
    }
    data_.push_back(std::move(data));
    scales_.emplace_back(out, size / 30);
    return {static_cast<int64_t>(kind_), data_.back().data(), int8 ? scales_.back().data() : nullptr};
  }

 private:
  gear::WeightKind kind_;
  unsigned seed_ = 20;
  std::vector<std::vector<char>> data_;
  std::vector<std::vector<float>> scales_;
};

// A generator as torch seeds it: all words are to be made.
std::unique_ptr<gear::TorchGenerator> torch_generator() {
  auto generator = std::make_unique<gear::TorchGenerator>();
  generator->left = generator->seeded = 1;
  std::uint32_t word = 5489;
  for (int i = 0; i < gear::kMersenneWords; ++i) {
    generator->words[i] = word;
    word = 1812433253u * (word ^ (word >> 30)) + static_cast<std::uint32_t>(i) + 1;
  }
  return generator;
}

// Two steps of a model of two layers, then three in one call; fp32 activations.
std::vector<float> step(gear::WeightKind kind, bool fp8 = false) {
  constexpr int64_t layers = 2, dim = 64, ffn = 96, vocab = 203, heads = 4, kv_heads = 2, head_dim = 16;
  constexpr int64_t slots = 4, entries = 24, rows = 3;
  constexpr int64_t slot_stride = kv_heads * entries * head_dim, values_at = slots * slot_stride;
  const auto embeddings = normal(vocab * dim, 10), rope = normal(entries * head_dim, 11);
  const std::vector<float> ones(dim, 1.0f), bias(slots, 0.5f);
  CacheNumbers kv(fp8, layers * 2 * values_at, head_dim, 12);
  Weights weights(kind);
  const gear::StepModel model{layers,
                              dim,
                              ffn,
                              vocab,
                              heads,
                              kv_heads,
                              static_cast<int64_t>(gear::Dtype::f32),
                              embeddings.data(),
                              ones.data(),
                              weights.make(vocab, dim),
                              kv.data(),
                              slots,
                              entries,
                              2 * values_at,
                              values_at,
                              slot_stride,
                              entries * head_dim,
                              head_dim,
                              kv.scale_data(),
                              2 * values_at / head_dim,
                              values_at / head_dim,
                              slot_stride / head_dim,
                              entries,
                              bias.data(),
                              rope.data()};
  std::vector<int64_t> words(sizeof model / 8 + layers * sizeof(gear::StepLayer) / 8);
  std::memcpy(words.data(), &model, sizeof model);
  for (int64_t i = 0; i < layers; ++i) {
    const gear::StepLayer layer{ones.data(),
                                weights.make(dim + 2 * kv_heads * head_dim, dim),
                                weights.make(dim, dim),
                                ones.data(),
                                weights.make(ffn, dim),
                                weights.make(ffn, dim),
                                weights.make(dim, ffn)};
    std::memcpy(words.data() + (sizeof model + i * sizeof layer) / 8, &layer, sizeof layer);
  }
  std::vector<float> logits(2 * rows * vocab);
  const std::vector<int64_t> tokens{5, 202, 0}, at{3, 0, 2}, positions{0, 20, 7}, later{1, 21, 8};
  gear::cpu::decode_step(words.data(), 1e-5f, rows, tokens.data(), at.data(), positions.data(), logits.data());
  gear::cpu::decode_step(words.data(), 1e-5f, rows, tokens.data(), at.data(), later.data(),
                         logits.data() + rows * vocab);

  // Image 0 is row 0, image 1 is guided: rows 1 and 2.
  constexpr int64_t images = 2, length = 12;
  std::vector<int64_t> drawn(images * length, 7);
  const std::vector<int64_t> token_rows{1, 0}, first{5, 9}, uncond{-1, 2}, top_k{vocab, 40}, seeds{1, -7};
  const std::vector<float> scale{1, 3}, temperature{1, 0.7f}, top_p{1, 0.9f};
  const bool greedy[images] = {false, false};
  auto generator = torch_generator();
  for (const int64_t* source : {seeds.data(), static_cast<const int64_t*>(nullptr)}) {
    const auto [made, finite] = gear::cpu::decode_steps(
        words.data(), 1e-5f, 3, 1e9, rows, at.data(), drawn.data(), images, length, images, token_rows.data(),
        first.data(), uncond.data(), scale.data(), temperature.data(), top_k.data(), top_p.data(), greedy, source,
        source == nullptr ? generator.get() : nullptr);
    logits.insert(logits.end(), drawn.begin(), drawn.end());
    logits.push_back(static_cast<float>(made));
    logits.push_back(finite);
  }
  return logits;
}

std::vector<float> exponentials() {
  std::vector<float> numbers(20000);
  auto generator = torch_generator();
  gear::cpu::torch_exponential(generator.get(), 20000, numbers.data());
  return numbers;
}

std::vector<float> sampled(bool given) {
  constexpr int64_t images = 4, vocab = 1003;
  const auto logits = normal(2 * images * vocab, 13);
  auto noise = normal(images * vocab, 14);
  for (float& q : noise) q = std::fabs(q) + 1e-3f;
  const std::vector<int64_t> uncond{4, 5, -1, 7}, top_k{vocab, 50, vocab, 1}, seeds{1, -7, 1ll << 40, 0};
  const std::vector<int64_t> positions{0, 255, 3, 9};
  const std::vector<float> scale{4, 1.5f, 1, 2}, temperature{1, 0.7f, 2, 1}, top_p{1, 1, 0.8f, 1};
  const bool greedy[images] = {false, false, false, true}, draws[images] = {true, true, false, true};
  std::vector<int64_t> tokens(images);
  gear::cpu::sample_tokens(images, vocab, logits.data(), uncond.data(), scale.data(), temperature.data(), top_k.data(),
                           top_p.data(), greedy, given ? noise.data() : nullptr, seeds.data(), positions.data(), draws,
                           tokens.data());
  return {tokens.begin(), tokens.end()};
}

std::vector<float> philox() {
  std::vector<float> q(1003);
  gear::cpu::philox_noise(1ll << 40, 17, static_cast<int64_t>(q.size()), q.data());
  return q;
}

std::vector<float> signs() {
  constexpr int64_t n = 3000, d = 18, groups = 2;
  const auto z = normal(n * d, 15);
  std::vector<int64_t> indices(n * groups);
  std::vector<float> result(n * d);
  gear::cpu::sign_bits(z.data(), 1, n, n, d, groups, indices.data(), result.data());
  for (const int64_t index : indices) result.push_back(static_cast<float>(index));
  return result;
}

std::vector<float> readout() {
  constexpr int64_t n = 450, k = 300, d = 8, c = 24;
  const auto z = normal(n * d, 16), codebook = normal(k * d, 17), bias = normal(k, 18), table = normal(k * c, 19);
  const auto grad = normal(n * c, 29), delta = normal(n, 30);
  std::vector<float> out(n * c), lse(n), dz(n * d), dcodebook(k * d), dbias(k), dtable(k * c);
  gear::cpu::soft_readout(z.data(), codebook.data(), bias.data(), table.data(), n, k, d, c, 0.7f, out.data(),
                          lse.data());
  gear::cpu::dual_readout_backward(grad.data(), delta.data(), lse.data(), z.data(), codebook.data(), bias.data(),
                                   table.data(), n, k, d, c, 0.7f, dz.data(), dcodebook.data(), dbias.data(),
                                   dtable.data());
  for (const auto* part : {&lse, &dz, &dcodebook, &dbias, &dtable}) out.insert(out.end(), part->begin(), part->end());
  return out;
}

// By every kind of kernel: directly with edges 1, 2 and 3, and in tiles.
std::vector<float> convolution() {
  constexpr int64_t rows = 9, width = 70, in = 20, out = 70;
  const auto x = normal((rows + 2) * width * in, 20), weight = normal(out * in * 9, 21), bias = normal(out, 22);
  std::vector<float> packed(2 * 2 * 9 * gear::kConvChunk * gear::kConvBlock), all;
  for (const int edge : {1, 2, 3}) {
    std::vector<float> y(rows * (width + 1) * out);  // a column of zeros at either side, but for edge 1
    const int64_t columns = edge == 1 ? width : width + 3 - edge;
    gear::cpu::conv_rows_pack(weight.data(), packed.data(), out, in, edge);
    gear::cpu::conv_rows(x.data(), packed.data(), bias.data(), y.data(), rows, width, columns, in, out, edge, edge > 1);
    all.insert(all.end(), y.begin(), y.end());
  }
  for (const int tile : {2, 4, 5}) {
    std::vector<float> spectra(gear::winograd_frequencies(tile) * 3 * gear::winograd_depth(in) * gear::kWinogradPanel);
    std::vector<float> y(rows * (width + 1) * out);
    const int64_t columns = width + 3 - gear::winograd_edge(tile);
    gear::cpu::winograd_rows_pack(weight.data(), spectra.data(), out, in, tile);
    gear::cpu::winograd_rows(x.data(), spectra.data(), bias.data(), y.data(), rows, width, columns, in, out, 1, tile);
    all.insert(all.end(), y.begin(), y.end());
  }
  return all;
}

// The residual stream of two convolutions, the second of an upsampling, then the norm that follows them.
std::vector<float> residuals() {
  constexpr int64_t rows = 10, width = 12, channels = 64, groups = 32, n = rows * width * channels;
  const auto first = normal(n, 6), second = normal((rows / 2 + 1) * (width / 2 + 1) * 4 * channels, 7);
  const auto weight = normal(channels, 8), bias = normal(channels, 9);
  std::vector<float> x(n), y(n);
  std::vector<double> moments(rows * groups * 2);
  gear::cpu::residual_moments(first.data(), 0, x.data(), false, -1, moments.data(), rows, width, channels, groups);
  gear::cpu::residual_moments(second.data(), 0, x.data(), true, 1, moments.data(), rows, width, channels, groups);
  gear::cpu::group_norm_silu(x.data(), 0, y.data(), 0, rows, width, channels, moments.data(), rows, groups,
                             weight.data(), bias.data(), 1e-6, true);
  y.insert(y.end(), x.begin(), x.end());
  y.insert(y.end(), moments.begin(), moments.end());
  return y;
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
  std::printf("%-22s %s\n", name, equal ? "equal from every thread" : "DIFFERS");
  return equal;
}

// Counts a task while it runs, however it ends.
struct Running {
  std::atomic<int>& count;
  explicit Running(std::atomic<int>& tasks) : count(tasks) { ++count; }
  ~Running() { --count; }
};

// Tasks that throw, some from a call of their own: the caller gets the exception when no task runs any more, and the
// pool serves the next call.
bool failures_reach_the_caller() {
  std::atomic<bool> right{true};
  const auto call = [&right](std::int64_t bad) {
    std::atomic<int> running{0};
    bool caught = false;
    try {
      gear::parallel_for(200, [&](std::int64_t task) {
        const Running guard(running);
        gear::parallel_for(3, [&](std::int64_t inner) {
          if (task % bad == bad - 1 && inner == 1) throw std::bad_alloc();
        });
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    std::vector<int> done(200);
    gear::parallel_for(200, [&](std::int64_t task) { ++done[static_cast<size_t>(task)]; });
    if (!caught || running != 0 || done != std::vector<int>(200, 1)) right = false;
  };
  for (const int pool : {1, 2, 5}) {
    gear::set_num_threads(pool);
    for (int round = 0; round < 20; ++round) {
      std::vector<std::thread> callers;
      for (const std::int64_t bad : {1, 7, 200}) callers.emplace_back(call, bad);
      for (std::thread& caller : callers) caller.join();
      call(200);
    }
  }
  std::printf("%-22s %s\n", "tasks that throw", right ? "reach their caller" : "ARE LOST");
  return right;
}

}  // namespace

int main() {
  bool equal = true;
  equal &= same_from_every_thread("codebook_quantize l2", [] { return quantize(0); });
  equal &= same_from_every_thread("codebook_quantize ip", [] { return quantize(1); });
  equal &= same_from_every_thread("skinny_linear", linear);
  equal &= same_from_every_thread("decode_attention", [] { return attention(false); });
  equal &= same_from_every_thread("attention, fp8 cache", [] { return attention(true); });
  equal &= same_from_every_thread("decode_steps fp32", [] { return step(gear::WeightKind::f32_rows); });
  equal &= same_from_every_thread("decode_steps bf16", [] { return step(gear::WeightKind::bf16_panels); });
  equal &= same_from_every_thread("decode_steps int8", [] { return step(gear::WeightKind::int8_panels); });
  equal &= same_from_every_thread("steps, fp8 cache", [] { return step(gear::WeightKind::bf16_panels, true); });
  equal &= same_from_every_thread("sample_tokens noise", [] { return sampled(true); });
  equal &= same_from_every_thread("sample_tokens philox", [] { return sampled(false); });
  equal &= same_from_every_thread("philox_noise", philox);
  equal &= same_from_every_thread("torch_exponential", exponentials);
  equal &= same_from_every_thread("sign_bits", signs);
  equal &= same_from_every_thread("read-out both ways", readout);
  equal &= same_from_every_thread("conv_rows", convolution);
  equal &= same_from_every_thread("residuals and norm", residuals);
  equal &= failures_reach_the_caller();
  return equal ? EXIT_SUCCESS : EXIT_FAILURE;
}
