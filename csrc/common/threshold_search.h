// Thresholds among floats without sorting them, bit by bit over keys of the same order.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace gear {

// key(a) < key(b) if a < b. -0 and +0 are one value and have one key.
GEAR_HD inline std::uint32_t order_key(float x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(float_bits(x + 0.0f));
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

GEAR_HD inline float key_value(std::uint32_t key) {
  return bits_float(static_cast<std::int32_t>(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu)));
}

#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
// The largest key for which `holds`, which is true up to some key and false above it; 0 if it is false everywhere.
// E.g. the k-th largest of some numbers is the largest key that at least k of their keys reach.
template <class Holds>
GEAR_HD std::uint32_t largest_key(Holds holds) {
  std::uint32_t found = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const std::uint32_t candidate = found | (1u << bit);
    if (holds(candidate)) found = candidate;
  }
  return found;
}

#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
// The smallest key for which `holds`, which is false below some key and true from it on; ~0 if it is false everywhere.
template <class Holds>
GEAR_HD std::uint32_t smallest_key(Holds holds) {
  std::uint32_t found = 0xffffffffu;
  for (int bit = 31; bit >= 0; --bit) {
    const std::uint32_t candidate = found & ~(1u << bit);
    if (holds(candidate)) found = candidate;
  }
  return found;
}

// How many of `ties` equal probabilities top-p keeps when `before` lies above them: each whose predecessors do not sum
// to more than top_p. Sums are doubles, rounded to fp32 when they are compared.
GEAR_HD inline int kept_ties(double before, float probability, int ties, float top_p) {
  if (probability == 0.0f) return static_cast<float>(before) <= top_p ? ties : 0;
  int kept = 0;
  while (kept < ties && static_cast<float>(before) <= top_p) {
    before += static_cast<double>(probability);
    ++kept;
  }
  return kept;
}

}  // namespace gear
