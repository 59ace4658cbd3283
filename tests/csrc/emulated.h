// Cases for the sanitizers: tiny calls of the emulated kernels, one file per op.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace gear::emulated {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

inline void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

// Sums of four uniform numbers: near enough to normal, and quicker to compile than <random>.
inline std::vector<float> normal(std::size_t n, unsigned seed) {
  std::uint64_t state = seed;
  std::vector<float> values(n);
  for (float& x : values) {
    x = -2.0f;
    for (int i = 0; i < 4; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      x += static_cast<float>(state >> 40) * 0x1p-24f;
    }
  }
  return values;
}

}  // namespace gear::emulated

// GEAR_CASE(name) { body }
#define GEAR_CASE(name)                                               \
  static void name();                                                 \
  static const gear::emulated::Register register_##name{#name, name}; \
  static void name()
