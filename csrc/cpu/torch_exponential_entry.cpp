#include "cpu/torch_exponential.h"

#include <stdexcept>

namespace gear::cpu {

void torch_exponential(TorchGenerator* generator, std::int64_t n, float* out) {
  const TorchGenerator& state = *generator;
  const bool fresh = state.left == 1 && state.next <= kMersenneWords;
  const bool within = state.left > 1 && state.left <= kMersenneWords &&
                      state.next == static_cast<std::uint64_t>(kMersenneWords + 1 - state.left);
  if (!fresh && !within) throw std::invalid_argument("these bytes are no state of torch's CPU generator");
  if (n > 0) GEAR_DISPATCH(torch_exponential)(*generator, n, out);
}

}  // namespace gear::cpu
