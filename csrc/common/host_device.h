// What headers need to be compiled for the host and the device alike: the function qualifier, and floats as bits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GEAR_HD __host__ __device__
#else
#define GEAR_HD
#endif

namespace gear {

GEAR_HD inline std::int32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  std::int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
#endif
}

GEAR_HD inline float bits_float(std::int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
#endif
}

}  // namespace gear
