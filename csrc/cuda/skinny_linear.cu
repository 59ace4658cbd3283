// A linear layer for few rows with the norm before it and the SwiGLU or residual after it; see ops/skinny_linear.py.
//
// Kernels of this op have run only under the CPU emulation of tests/csrc, not on hardware.
//
//   rows       bf16, fp16                    fp32
//   1 … 16     narrow: the norm inside       f32, 4 rows per block up to 4 rows, else 16; the norm before
//   17 …       wide: the norm before
//
// A row's bits depend on the row and the weights only: the order of its sums follows from in_features (see
// skinny_linear.cuh), and an output of a tensor core's tile depends on its own row and column alone.
//
// Weights as the tensor core's 16-row operand and rows of x as its 8-wide one: few rows then waste few products.
// Prefetching weights across the dependency on the kernel before is the idea of HazyResearch's megakernels.
#include <stdexcept>

#include "cuda/platform.cuh"
#include "cuda/skinny_linear.h"
#include "cuda/skinny_linear_f32.cuh"
#include "cuda/skinny_linear_narrow.cuh"
#include "cuda/skinny_linear_wide.cuh"

namespace gear::cuda {
namespace {

using namespace skinny;

unsigned blocks(int n, int per_block) { return static_cast<unsigned>((n + per_block - 1) / per_block); }

bool norm_before(int dtype, std::int64_t rows) { return dtype == 0 || rows > narrow::kTokens; }

struct Call {
  Problem problem;
  bool overlap;
  void* stream;

  Launch at(dim3 grid, int threads, int shared) const {
    return {grid, dim3(static_cast<unsigned>(threads)), static_cast<std::size_t>(shared), stream, overlap};
  }
};

template <class T, bool kNorm, bool kGate>
void launch_narrow(const Call& call) {
  const Problem& p = call.problem;
  constexpr int kStage = narrow::Layout<kNorm, kGate>::stage_bytes;
  const int stages = narrow::stages_for(shared_memory_limit(), shared_memory_of_sm(), kStage);
  const dim3 grid(blocks(p.out_features, narrow::kOutputs), blocks(p.rows, narrow::kTokens));
  launch("skinny_linear", call.at(grid, narrow::kThreads, stages * kStage), narrow::kernel<T, kNorm, kGate>, p, stages);
}

template <class T, int kTokens, bool kGate>
void launch_wide(const Call& call) {
  const Problem& p = call.problem;
  const dim3 grid(blocks(p.out_features, wide::outputs<kGate>), blocks(p.rows, kTokens));
  launch("skinny_linear", call.at(grid, wide::kThreads, wide::shared_bytes<kTokens>), wide::kernel<T, kTokens, kGate>,
         p);
}

template <int kTokens, int kOutputs, bool kGate>
void launch_f32(const Call& call) {
  const Problem& p = call.problem;
  const dim3 grid(blocks(p.out_features, f32::kWarps * (kGate ? kOutputs / 2 : kOutputs)), blocks(p.rows, kTokens));
  launch("skinny_linear", call.at(grid, f32::kThreads, f32::shared_bytes<kTokens>),
         f32::kernel<kTokens, kOutputs, kGate>, p);
}

// x becomes its norm, in the workspace.
template <class T>
void normalise(Call& call, void* workspace) {
  Problem norm = call.problem;
  norm.y = workspace;
  launch("skinny_linear", call.at(dim3(blocks(norm.rows, kNormThreads / 32)), kNormThreads, 0), normalise_kernel<T>,
         norm);
  call.problem.x = workspace;
  call.problem.norm_weight = nullptr;
  call.overlap = true;  // of the kernel that follows, with normalise_kernel, which writes no weights
}

template <class T, bool kGate>
void run_narrow_float(const Call& call) {
  if (call.problem.rows > 32) {
    launch_wide<T, 64, kGate>(call);
  } else if (call.problem.rows > narrow::kTokens) {
    launch_wide<T, 32, kGate>(call);
  } else if (call.problem.norm_weight != nullptr) {
    launch_narrow<T, true, kGate>(call);
  } else {
    launch_narrow<T, false, kGate>(call);
  }
}

template <class T, bool kGate>
void run(Call call, void* workspace) {
  constexpr int kDtype = sizeof(T) == 4 ? 0 : 1;
  if (call.problem.norm_weight != nullptr && norm_before(kDtype, call.problem.rows)) normalise<T>(call, workspace);
  if constexpr (kDtype == 1) {
    run_narrow_float<T, kGate>(call);
  } else if (call.problem.rows <= 4) {
    launch_f32<4, 2, kGate>(call);
  } else {
    launch_f32<16, 4, kGate>(call);
  }
}

template <class T>
void run(const Call& call, void* workspace) {
  if (call.problem.gate != nullptr) {
    run<T, true>(call, workspace);
  } else {
    run<T, false>(call, workspace);
  }
}

}  // namespace

std::size_t skinny_linear_workspace(int dtype, std::int64_t rows, std::int64_t in_features, bool has_norm) {
  if (!has_norm || !norm_before(dtype, rows)) return 0;
  return static_cast<std::size_t>(rows * in_features) * (dtype == 0 ? 4 : 2);
}

void skinny_linear(const void* x, int dtype, std::int64_t rows, std::int64_t in_features, std::int64_t out_features,
                   const void* norm_weight, float norm_eps, const void* weight, const void* gate, const void* residual,
                   void* y, bool f32_output, void* workspace, bool overlap, void* stream) {
  if (rows == 0 || out_features == 0) return;
  const auto is_aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  const bool aligned = in_features * (dtype == 0 ? 4 : 2) % 16 == 0 && is_aligned(x) && is_aligned(norm_weight) &&
                       is_aligned(weight) && is_aligned(gate) && is_aligned(workspace);
  const Problem problem{x,
                        norm_weight,
                        weight,
                        gate,
                        residual,
                        y,
                        static_cast<int>(rows),
                        static_cast<int>(in_features),
                        static_cast<int>(out_features),
                        norm_eps,
                        f32_output,
                        aligned};
  const Call call{problem, overlap, stream};
  switch (dtype) {
    case 0:
      return run<float>(call, workspace);
    case 1:
      return run<bfloat16>(call, workspace);
    case 2:
      return run<float16>(call, workspace);
    default:
      throw std::invalid_argument("skinny_linear: unknown dtype");
  }
}

}  // namespace gear::cuda
