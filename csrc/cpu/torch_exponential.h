// The numbers that torch's CPU generator gives to Tensor.exponential_(1) in fp32, and the state it is left in, bit for
// bit; see ops/torch_exponential.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace gear {

constexpr int kMersenneWords = 624;

// The bytes of torch.Generator.get_state(): MT19937, Matsumoto and Nishimura 1998. The next left - 1 words are those
// from `next` on; then all words are made anew.
struct TorchGenerator {
  std::uint64_t seed;
  std::int32_t left, seeded;
  std::uint64_t next;
  std::uint64_t words[kMersenneWords];
  char normal[40];  // a normal number kept for later; not ours to touch
};
static_assert(sizeof(TorchGenerator) == 5056 && offsetof(TorchGenerator, words) == 24);

namespace cpu {

// out[0 … n), and the state after them. Throws std::invalid_argument if the state is none.
void torch_exponential(TorchGenerator* generator, std::int64_t n, float* out);

}  // namespace cpu
}  // namespace gear

GEAR_DECLARE_ISA(void, torch_exponential, (gear::TorchGenerator & generator, std::int64_t n, float* out))
