// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), and how an image's stream is
// keyed: counter (token / 4, position, 0, 0), key (low and high word of the seed), word token % 4. ops/philox.py is the
// reference; every backend gives its bits.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace gear {

struct PhiloxWords {
  std::uint32_t word[4];
};

GEAR_HD inline PhiloxWords philox4x32(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                                      std::uint32_t k0, std::uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = static_cast<std::uint64_t>(c0) * 0xD2511F53u;
    const std::uint64_t product1 = static_cast<std::uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return PhiloxWords{{c0, c1, c2, c3}};
}

// The four words of tokens 4 block … 4 block + 3.
GEAR_HD inline PhiloxWords philox_tokens(std::uint64_t seed, std::uint32_t position, std::uint32_t block) {
  return philox4x32(block, position, 0u, 0u, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

}  // namespace gear
