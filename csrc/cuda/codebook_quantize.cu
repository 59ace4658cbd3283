// codebook_quantize on a GPU: the index of the official formula, as csrc/cpu/codebook_quantize.h defines it.
//
// The kernels of this op have run only under the CPU emulation of tests/csrc, not on hardware.
//
//   slots that are used                     steps of 16 slots    terms
//   at most 32 by 3 or 2 terms (d <= 14)    2                    3 (l2: d <= 9), else 2
//   at most 256 (l2: d <= 253)              16                   as many as fit
//   more                                    the official formula for every code
//
// Memory: the packed codebook and a list of rows, O(N + K d); no N x K array.
#include <stdexcept>

#include "cuda/codebook_quantize.h"
#include "cuda/codebook_quantize_exact.cuh"
#include "cuda/codebook_quantize_tensor.cuh"
#include "cuda/platform.cuh"

namespace gear::cuda {
namespace {

using namespace codebook;

constexpr std::int64_t kMostBlocks = 1 << 30;
constexpr unsigned kOpenBlocks = 264;  // of the exact kernel after proposals: two for each SM of the largest GPU

struct Plan {
  int steps;  // 0: no proposals
  int terms;
};

Plan plan(std::int64_t d, bool inner_product) {
  const std::int64_t bias = inner_product ? 0 : kBiasSlots;
  for (const int terms : {3, 2})
    if (terms * d + bias <= 32) return {2, terms};
  for (const int terms : {3, 2, 1})
    if (terms * d + bias <= 256) return {16, terms};
  return {0, 0};
}

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

// The parts of the workspace.
struct Parts {
  std::size_t tiles, norms, rows, total;
};

template <int kSteps>
Parts parts(std::int64_t n, std::int64_t k) {
  using At = tensor::Shape<kSteps>;
  const auto count = static_cast<std::size_t>((k + At::codes - 1) / At::codes);
  const std::size_t tiles = aligned(count * At::tile_values * sizeof(bfloat16));
  const std::size_t norms = tiles + aligned(count * 3 * sizeof(float));
  const std::size_t rows = norms + aligned(static_cast<std::size_t>(n) * sizeof(std::int64_t));
  return {tiles, norms, rows, rows + 256};
}

void run_exact(const Problem& p, unsigned blocks, const std::int64_t* list, const int* count, void* stream) {
  const std::size_t shared = static_cast<std::size_t>(exact::kRows * p.d) * sizeof(float);  // 16 KiB at d = 512
  launch("codebook_quantize", {blocks, exact::kThreads, shared, stream}, exact::kernel, p, list, count);
}

template <int kSteps>
void run_tensor(const Problem& p, int terms, char* workspace, void* stream) {
  using At = tensor::Shape<kSteps>;
  const Parts at = parts<kSteps>(p.n, p.k);
  const int count = (p.k + At::codes - 1) / At::codes;
  const tensor::Packed packed{reinterpret_cast<bfloat16*>(workspace), reinterpret_cast<float*>(workspace + at.tiles),
                              count, terms};
  const tensor::Open open{reinterpret_cast<std::int64_t*>(workspace + at.norms),
                          reinterpret_cast<int*>(workspace + at.rows)};
  launch("codebook_quantize", {static_cast<unsigned>(count), At::pack_threads, 0, stream}, tensor::pack_kernel<kSteps>,
         p, packed, open);
  const auto blocks = static_cast<unsigned>((p.n + tensor::kBlockRows - 1) / tensor::kBlockRows);
  launch("codebook_quantize", {blocks, tensor::kThreads, At::shared_bytes, stream}, tensor::propose_kernel<kSteps>, p,
         packed, open);
  const auto most = static_cast<unsigned>((p.n + exact::kRows - 1) / exact::kRows);
  run_exact(p, most < kOpenBlocks ? most : kOpenBlocks, open.rows, open.count, stream);
}

}  // namespace

std::size_t codebook_quantize_workspace(std::int64_t n, std::int64_t k, std::int64_t d, int metric) {
  switch (plan(d, metric == 1).steps) {
    case 2:
      return parts<2>(n, k).total;
    case 16:
      return parts<16>(n, k).total;
    default:
      return 0;
  }
}

void codebook_quantize(const float* z, const float* z2, const float* codebook, const float* e2, std::int64_t n,
                       std::int64_t k, std::int64_t d, int metric, std::int64_t* indices, float* quantized,
                       void* workspace, void* stream) {
  if (n == 0) return;
  const Plan chosen = plan(d, metric == 1);
  const std::int64_t blocks = (n + exact::kRows - 1) / exact::kRows;
  if (blocks > kMostBlocks) throw std::invalid_argument("codebook_quantize: too many vectors for one call");
  const Problem p{z, z2, codebook, e2, n, static_cast<int>(k), static_cast<int>(d), metric == 1, indices, quantized};
  char* memory = static_cast<char*>(workspace);
  switch (chosen.steps) {
    case 2:
      return run_tensor<2>(p, chosen.terms, memory, stream);
    case 16:
      return run_tensor<16>(p, chosen.terms, memory, stream);
    default:
      return run_exact(p, static_cast<unsigned>(blocks), nullptr, nullptr, stream);
  }
}

}  // namespace gear::cuda
