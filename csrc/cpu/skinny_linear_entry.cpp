#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/skinny_linear.h"

namespace gear {
namespace {

struct Buffer {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  std::size_t bytes = 0;
};

}  // namespace

void* scratch(Scratch purpose, std::size_t bytes) {
  thread_local Buffer buffers[static_cast<int>(Scratch::count)];
  Buffer& buffer = buffers[static_cast<int>(purpose)];
  if (buffer.bytes < bytes) {
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.memory.reset(std::aligned_alloc(4096, rounded));
    buffer.bytes = buffer.memory ? rounded : 0;
    if (!buffer.memory) throw std::bad_alloc();
  }
  return buffer.memory.get();
}

namespace cpu {

void linear(const Linear& call) {
  if (call.rows > 0 && call.out_features > 0) GEAR_DISPATCH(linear)(call);
}

void skinny_linear(const void* x, int activation, std::int64_t rows, std::int64_t in_features,
                   std::int64_t out_features, const void* norm_weight, float norm_eps, int kind, const void* weight,
                   const float* scales, const void* gate, const float* gate_scales, const void* residual, void* y) {
  const Dtype dtype = static_cast<Dtype>(activation);
  linear(Linear{rows, in_features, out_features, dtype, dtype, static_cast<WeightKind>(kind), x, norm_weight, norm_eps,
                weight, scales, gate, gate_scales, residual, y});
}

}  // namespace cpu
}  // namespace gear
