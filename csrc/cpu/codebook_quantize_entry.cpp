// Entry point of codebook_quantize: packs the codebook once and shares blocks of rows among threads. See the header.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "cpu/codebook_quantize.h"
#include "cpu/parallel.h"

namespace gear::cpu {
namespace {

using namespace gear::codebook_quantize;

struct Rows {
  int64_t first, last;
};

// max that keeps a NaN.
template <class T>
T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

// Runs body(block, worker) for every block, each worker with an index of its own below min(blocks, num_threads()).
template <class Body>
void share_blocks(int64_t blocks, Body body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(blocks, num_threads()), [&](int64_t worker) {
    for (int64_t block = next++; block < blocks; block = next++) body(block, worker);
  });
}

// The passes in fp32, for every row of `ranges`.
void quantize_fp32(const QuantizeProblem& problem, const std::vector<Rows>& ranges) {
  // Pack. Norms for the error bound are taken in double: they only have to be upper bounds after a little inflation.
  const int64_t k = problem.k, d = problem.d, width = GEAR_DISPATCH(codebook_panel_width)();
  const int64_t padded_k = (k + kGroup - 1) / kGroup * kGroup;
  // Not vectors: these are large, and written before they are read.
  const std::unique_ptr<float[]> panels(new float[static_cast<size_t>(padded_k * d)]);
  std::vector<float> bias(static_cast<size_t>(padded_k));
  std::vector<double> norms(static_cast<size_t>(padded_k / kGroup), 0.0);
  parallel_for(padded_k / kGroup, [&](int64_t group) {
    for (int64_t code = group * kGroup; code < (group + 1) * kGroup; code += width)
      GEAR_DISPATCH(codebook_pack_panel)(problem, code, panels.get() + code * d, bias.data() + code);
    double largest = 0;
    for (int64_t code = group * kGroup; code < std::min(k, (group + 1) * kGroup); ++code) {
      const float* e = problem.codebook + code * d;
      double norm2 = 0;
      for (int64_t i = 0; i < d; ++i) norm2 += static_cast<double>(e[i]) * e[i];
      largest = larger(largest, norm2);
    }
    norms[static_cast<size_t>(group)] = largest;
  });
  double max_norm2 = 0;
  for (const double norm2 : norms) max_norm2 = larger(max_norm2, norm2);
  const PackedCodebook packed{panels.get(), bias.data(), padded_k, max_norm2};

  std::vector<Rows> blocks;
  for (const Rows& range : ranges)
    for (int64_t row = range.first; row < range.last; row += kBlockRows)
      blocks.push_back({row, std::min(range.last, row + kBlockRows)});
  const auto n_blocks = static_cast<int64_t>(blocks.size());
  const int64_t scratch_floats = GEAR_DISPATCH(codebook_scratch_floats)(problem, padded_k);
  const int64_t workers = std::min<int64_t>(n_blocks, num_threads());
  const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(workers * scratch_floats)]);
  share_blocks(n_blocks, [&](int64_t block, int64_t worker) {
    const Rows& rows = blocks[static_cast<size_t>(block)];
    GEAR_DISPATCH(codebook_quantize_rows)
    (problem, packed, rows.first, rows.last, scratch.get() + worker * scratch_floats);
  });
}

#ifdef GEAR_X86
// Proposals in bf16 on tile registers; returns the rows that are left to the fp32 passes.
std::vector<Rows> quantize_tiles(const QuantizeProblem& problem) {
  const int64_t n = problem.n, n_slots = avx512::codebook_tile_slots(problem);
  const int64_t granules = (problem.k + 2 * kGranule - 1) / (2 * kGranule) * 2, granule_slots = kGranule * n_slots;
  struct Free {
    void operator()(uint16_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  const std::unique_ptr<uint16_t[], Free> slots(static_cast<uint16_t*>(
      ::operator new[](static_cast<size_t>(granules * granule_slots) * sizeof(uint16_t), std::align_val_t{64})));
  constexpr int64_t kPackGranules = 32;  // per task
  const int64_t tasks = (granules + kPackGranules - 1) / kPackGranules;
  std::vector<float> norms(static_cast<size_t>(tasks * 3), 0.0f);
  parallel_for(tasks, [&](int64_t task) {
    float* largest = norms.data() + task * 3;
    for (int64_t g = task * kPackGranules; g < std::min(granules, (task + 1) * kPackGranules); ++g) {
      float found[3];
      avx512::codebook_tile_pack(problem, g, n_slots, slots.get() + g * granule_slots, found);
      for (int i = 0; i < 3; ++i) largest[i] = larger(largest[i], found[i]);
    }
  });
  TiledCodebook codes{slots.get(), n_slots, granules, 0, 0, 0};
  for (int64_t task = 0; task < tasks; ++task) {
    codes.max_whole = larger(codes.max_whole, norms[static_cast<size_t>(task * 3)]);
    codes.max_low = larger(codes.max_low, norms[static_cast<size_t>(task * 3 + 1)]);
    codes.max_rest = larger(codes.max_rest, norms[static_cast<size_t>(task * 3 + 2)]);
  }

  // Large blocks read the codebook less often; small problems still give every thread a block.
  const int64_t share = (n + num_threads() - 1) / num_threads();
  const int64_t block_rows = std::min(kMostTileRows, (share + 31) / 32 * 32);
  const int64_t blocks = (n + block_rows - 1) / block_rows, workers = std::min<int64_t>(blocks, num_threads());
  const int64_t scratch_bytes = avx512::codebook_tile_scratch_bytes(codes, block_rows);
  const std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(workers * scratch_bytes)]);
  std::vector<char> settled(static_cast<size_t>(blocks));
  share_blocks(blocks, [&](int64_t block, int64_t worker) {
    settled[static_cast<size_t>(block)] =
        avx512::codebook_tile_rows(problem, codes, block * block_rows, std::min(n, (block + 1) * block_rows),
                                   block_rows, scratch.get() + worker * scratch_bytes);
  });
  std::vector<Rows> open;
  for (int64_t block = 0; block < blocks; ++block)
    if (!settled[static_cast<size_t>(block)])
      open.push_back({block * block_rows, std::min(n, (block + 1) * block_rows)});
  return open;
}
#endif

}  // namespace

void codebook_quantize(const float* z, const float* z2, const float* codebook, const float* e2, int64_t n, int64_t k,
                       int64_t d, int metric, int64_t* indices, float* quantized) {
  const QuantizeProblem problem{z, z2, codebook, e2, n, k, d, static_cast<Metric>(metric), indices, quantized};
  if (n == 0) return;
  std::vector<Rows> open{{0, n}};
#ifdef GEAR_X86
  if (has_amx_bf16()) open = quantize_tiles(problem);
#endif
  if (!open.empty()) quantize_fp32(problem, open);
}

}  // namespace gear::cpu
