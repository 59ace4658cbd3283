// The words of CUDA C++ that a C++ compiler does not know, its vector types, and who a thread is.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static __attribute__((section("gear_shared")))
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define GEAR_VECTORS(T, name)                                \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
GEAR_VECTORS(float, float)
GEAR_VECTORS(int, int)
GEAR_VECTORS(unsigned, uint)
#undef GEAR_VECTORS

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Bounds of the section that holds every __shared__ variable.
extern "C" {
extern char __start_gear_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_gear_shared[] __attribute__((weak, visibility("hidden")));
}
