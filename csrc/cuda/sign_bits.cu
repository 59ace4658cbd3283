// Lookup-free quantization: one pass over the latent; bytes are all that it costs. See csrc/cpu/sign_bits.h.
//
// This kernel has run only under the CPU emulation of tests/csrc, not on hardware.
//
// A thread owns one group of one row and collects its bits. The signs of a block's groups are contiguous, so the block
// writes them together, from the bits in shared memory.
#include "cuda/sign_bits.h"

#include <stdexcept>

#include "cuda/platform.cuh"

namespace gear::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    sign_bits_kernel(const float* z, std::int64_t row_stride, std::int64_t channel_stride, std::int64_t pairs,
                     int groups, int width, std::int64_t* indices, float* signs) {
  __shared__ unsigned long long shared[kThreads];
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads, pair = first + threadIdx.x;
  if (pair < pairs) {
    const float* channel = z + pair / groups * row_stride + pair % groups * width * channel_stride;
    unsigned long long bits = 0;
    for (int i = 0; i < width; ++i) bits |= static_cast<unsigned long long>(channel[i * channel_stride] > 0.0f) << i;
    shared[threadIdx.x] = bits;
    indices[pair] = static_cast<std::int64_t>(bits);
  }
  __syncthreads();
  const int used = static_cast<int>(pairs - first < kThreads ? pairs - first : kThreads);
  for (int i = threadIdx.x; i < used * width; i += kThreads)
    signs[first * width + i] = (shared[i / width] >> (i % width) & 1) != 0 ? 1.0f : -1.0f;
}

}  // namespace

void sign_bits(const float* z, std::int64_t row_stride, std::int64_t channel_stride, std::int64_t n, std::int64_t d,
               std::int64_t groups, std::int64_t* indices, float* signs, void* stream) {
  const std::int64_t pairs = n * groups, blocks = (pairs + kThreads - 1) / kThreads;
  if (pairs == 0) return;
  if (blocks > 0x7fffffff) throw std::invalid_argument("sign_bits: too many vectors for one call");
  launch("sign_bits", {static_cast<unsigned>(blocks), kThreads, 0, stream}, sign_bits_kernel, z, row_stride,
         channel_stride, pairs, static_cast<int>(groups), static_cast<int>(d / groups), indices, signs);
}

}  // namespace gear::cuda
