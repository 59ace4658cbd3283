// The functions that CUDA declares everywhere: barriers, shuffles and votes, atomics, arithmetic, loads and stores.
#pragma once

#include <cmath>
#include <source_location>
#include <type_traits>

#include "common/narrow_floats.h"
#include "cuda_emulation/threads.h"

inline void __syncthreads(const std::source_location at = std::source_location::current()) {
  if (!gear::emulation::is_omitted(at)) gear::emulation::self.block->barrier.arrive_and_wait();
}
inline int __syncthreads_count(int predicate) { return gear::emulation::block_count(predicate != 0); }
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, const std::source_location at = std::source_location::current()) {
  gear::emulation::expect_whole_warp(mask);
  if (!gear::emulation::is_omitted(at)) gear::emulation::self.warp->barrier.arrive_and_wait();
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { gear::emulation::fail("trap"); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = gear::emulation::self.lane;
  return gear::emulation::shuffle(mask, value, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = gear::emulation::self.lane, source = lane ^ distance;
  return gear::emulation::shuffle(mask, value, source, source / width <= lane / width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = gear::emulation::self.lane, source = lane + static_cast<int>(distance);
  return gear::emulation::shuffle(mask, value, source, source / width == lane / width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = gear::emulation::self.lane, source = lane - static_cast<int>(distance);
  return gear::emulation::shuffle(mask, value, source, source >= 0 && source / width == lane / width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate != 0 ? 1u << gear::emulation::self.lane : 0u;
  return gear::emulation::reduce(mask, bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return gear::emulation::reduce(mask, value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return gear::emulation::reduce(mask, value, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return gear::emulation::reduce(mask, value, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T __reduce_or_sync(unsigned mask, T value) {
  return gear::emulation::reduce(mask, value, [](T a, T b) { return a | b; });
}

// *address = combine(*address), atomically; the old value.
template <class T, class Combine>
T gear_atomic(T* address, Combine combine) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_ACQUIRE);
  do next = combine(old);
  while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return old;
}
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return gear_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return gear_atomic(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return gear_atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return gear_atomic(address, [=](T old) { return old | value; });
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return gear_atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return gear_atomic(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return gear_atomic(address, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float_as_int(float x) { return gear::float_bits(x); }
inline float __int_as_float(int x) { return gear::bits_float(x); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(gear::float_bits(x)); }
inline float __uint_as_float(unsigned x) { return gear::bits_float(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
