// Runs CUDA kernels on a CPU, their bodies unmodified: for tests, under the sanitizers too. See csrc/cuda/platform.cuh.
//
// A block's threads are threads of the host; blocks run one after the other. __syncthreads is a std::barrier, a warp's
// shuffles and tensor-core products exchange their operands through a buffer between two of its barriers. So a missing
// barrier is a data race, which ThreadSanitizer reports; a lane that leaves its warp's lock step deadlocks.
//
//   __shared__          is static, filled with 0xff before every block; dynamic shared memory is allocated per block at
//                       its exact size, so that AddressSanitizer sees an overrun
//   cp.async            destroys its destination at once and copies when it is waited for: a missing wait shows
//   mma                 exact products, summed in double and rounded once
//   fences              are implied: atomics acquire and release
//
// GEAR_OMIT_BARRIER=file:line in the environment leaves out the __syncthreads there, to see that it would be missed.
//
// Not emulated: blocks that wait for each other, clusters, TMA, wgmma, and shuffles among part of a warp.
#pragma once

#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <source_location>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "common/host_device.h"
#include "common/narrow_floats.h"

// ---- The language
// ----------------------------------------------------------------------------------------------------

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

// ---- Blocks, warps, threads
// ------------------------------------------------------------------------------------------

namespace gear::emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s, thread (%u, %u, %u) of block (%u, %u, %u)\n", what, threadIdx.x, threadIdx.y,
               threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
  std::abort();
}

inline void expect(bool holds, const char* what) {
  if (!holds) fail(what);
}

inline void expect_aligned(const void* pointer, std::size_t bytes) {
  expect(reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0, "misaligned address");
}

struct Words {
  alignas(16) std::uint32_t word[8];
};

struct Warp {
  explicit Warp(int n) : lanes(n), barrier(n) {}
  int lanes;
  std::barrier<> barrier;
  Words exchange[2][32];
};

constexpr std::align_val_t kSharedAlignment{128};
struct FreeShared {
  void operator()(unsigned char* memory) const { ::operator delete[](memory, kSharedAlignment); }
};

struct Block {
  Block(int n, std::size_t shared_bytes) : threads(n), barrier(n) {
    for (int first = 0; first < n; first += 32)
      warps.push_back(std::make_unique<Warp>(n - first < 32 ? n - first : 32));
    shared.reset(new (kSharedAlignment) unsigned char[shared_bytes]);
    std::memset(shared.get(), 0xff, shared_bytes);
    if (__start_gear_shared != nullptr)
      std::memset(__start_gear_shared, 0xff, static_cast<std::size_t>(__stop_gear_shared - __start_gear_shared));
  }

  int threads;
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<unsigned char[], FreeShared> shared;
  std::mutex mutex;  // of the creation of named barriers
  std::unique_ptr<std::barrier<>> named[16];
  int named_threads[16] = {};
  int votes[2] = {};  // of __syncthreads_count and its kin
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

// What one CUDA thread holds.
struct Thread {
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  unsigned exchanges = 0, votes = 0;      // so far: they alternate between two buffers
  std::vector<Copy> open;                 // copies of the group that is not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

inline thread_local Thread self;

// Publishes this lane's words to its warp and returns everybody's. Two buffers take turns, so that one barrier is
// enough: a buffer is written again only after the barrier of the exchange between.
inline const Words* exchange(const Words& mine) {
  Words* buffer = self.warp->exchange[self.exchanges++ % 2];
  buffer[self.lane] = mine;
  self.warp->barrier.arrive_and_wait();
  return buffer;
}

inline void expect_whole_warp(unsigned mask) {
  expect(mask == 0xffffffffu, "only shuffles and votes of the whole warp are emulated");
}

template <class T>
Words to_words(T value) {
  static_assert(sizeof(T) <= sizeof(Words) && std::is_trivially_copyable_v<T>);
  Words words{};
  std::memcpy(&words, &value, sizeof(T));
  return words;
}

template <class T>
T from_words(const Words& words) {
  T value;
  std::memcpy(&value, &words, sizeof(T));
  return value;
}

// The value of `lane`; a lane that is not there gives this one's, as on a GPU.
template <class T>
T shuffle(unsigned mask, T value, int lane, bool inside = true) {
  expect_whole_warp(mask);
  const Words* all = exchange(to_words(value));
  return inside && lane < self.warp->lanes ? from_words<T>(all[lane]) : value;
}

// combine(a, b) over all lanes, in order.
template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine) {
  expect_whole_warp(mask);
  const Words* all = exchange(to_words(value));
  T result = from_words<T>(all[0]);
  for (int lane = 1; lane < self.warp->lanes; ++lane) result = combine(result, from_words<T>(all[lane]));
  return result;
}

inline int block_count(bool predicate) {
  int& count = self.block->votes[self.votes++ % 2];
  int& next = self.block->votes[self.votes % 2];
  if (predicate) __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED);
  self.block->barrier.arrive_and_wait();
  const int result = __atomic_load_n(&count, __ATOMIC_RELAXED);
  // Everybody has left the other counter: its readers arrived at this barrier.
  __atomic_store_n(&next, 0, __ATOMIC_RELAXED);
  self.block->barrier.arrive_and_wait();
  return result;
}

inline bool is_omitted(const std::source_location& at) {
  static const char* const omitted = std::getenv("GEAR_OMIT_BARRIER");
  if (omitted == nullptr) return false;
  const std::string place = std::string(at.file_name()) + ":" + std::to_string(at.line());
  const std::size_t length = std::strlen(omitted);
  return place.size() > length && place[place.size() - length - 1] == '/' && place.ends_with(omitted);
}

// Runs body() for every thread of every block.
template <class Body>
void run(dim3 grid, dim3 block, std::size_t shared, const char* name, const Body& body) {
  const unsigned threads = block.x * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535 || shared > 227 * 1024) {
    std::fprintf(stderr, "emulated CUDA: %s: invalid launch\n", name);
    std::abort();
  }
  std::optional<Block> running;
  const auto next_block = [&]() noexcept { running.emplace(static_cast<int>(threads), shared); };
  std::barrier gate(static_cast<std::ptrdiff_t>(threads), next_block);
  const auto worker = [&](unsigned index) {
    threadIdx = {index % block.x, index / block.x % block.y, index / block.x / block.y};
    blockDim = block;
    gridDim = grid;
    for (std::uint64_t at = 0; at < blocks; ++at) {
      blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                  static_cast<unsigned>(at / grid.x / grid.y)};
      gate.arrive_and_wait();
      self = Thread{};
      self.block = &*running;
      self.warp = running->warps[index / 32].get();
      self.lane = static_cast<int>(index % 32);
      body();
      expect(self.open.empty() && self.groups.empty(), "ended with copies that nobody waited for");
      // Threads that have ended are not waited for.
      self.block->barrier.arrive_and_drop();
      self.warp->barrier.arrive_and_drop();
    }
  };
  std::vector<std::thread> team;
  for (unsigned index = 0; index < threads; ++index) team.emplace_back(worker, index);
  for (std::thread& thread : team) thread.join();
}

}  // namespace gear::emulation

// ---- Functions of CUDA
// -----------------------------------------------------------------------------------------------

inline void __syncthreads(const std::source_location at = std::source_location::current()) {
  if (!gear::emulation::is_omitted(at)) gear::emulation::self.block->barrier.arrive_and_wait();
}
inline int __syncthreads_count(int predicate) { return gear::emulation::block_count(predicate != 0); }
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  gear::emulation::expect_whole_warp(mask);
  gear::emulation::self.warp->barrier.arrive_and_wait();
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

// ---- The functions of platform.cuh
// -----------------------------------------------------------------------------------

namespace gear::cuda {

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::self.block->shared.get());
}

template <int kBytes>
void copy_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulation::expect_aligned(shared, kBytes);
  emulation::expect_aligned(global, kBytes);
  emulation::expect(valid >= 0 && valid <= kBytes, "copy of more bytes than its size");
  std::memset(shared, 0xff, kBytes);
  emulation::self.open.push_back({shared, global, kBytes, valid});
}
inline void copy_async_commit() {
  emulation::self.groups.push_back(std::move(emulation::self.open));
  emulation::self.open.clear();
}
template <int kPending>
void copy_async_wait() {
  auto& groups = emulation::self.groups;
  while (groups.size() > kPending) {
    for (const emulation::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, static_cast<std::size_t>(copy.bytes));
      std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.valid));
    }
    groups.erase(groups.begin());
  }
}

// Element k of row (or column) `line` of a tensor-core operand whose registers pack `kPack` elements: lane 4 line + i
// holds elements kPack i … and, in register `half`, those 4 kPack further on.
template <int kPack>
float operand(const std::uint32_t* low, const std::uint32_t* high, int k, float (*decode)(std::uint32_t, int)) {
  const int at = k % (4 * kPack);
  const std::uint32_t* words = k < 4 * kPack ? low : high;
  return decode(words[at / kPack * 8], at % kPack);
}

// One D += A B; words 0 to 3 of the exchange are A's registers, 4 and 5 are B's.
template <int kPack>
void multiply(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
              float (*decode)(std::uint32_t, int)) {
  emulation::expect(emulation::self.warp->lanes == 32, "tensor cores need a whole warp");
  emulation::Words mine{{a[0], a[1], a[2], a[3], b[0], b[1], 0, 0}};
  const emulation::Words* all = emulation::exchange(mine);
  const int lane = emulation::self.lane;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, upper = i / 2, column = lane % 4 * 2 + i % 2;
    double total = d[i];
    for (int k = 0; k < 8 * kPack; ++k) {
      const float x = operand<kPack>(&all[row * 4].word[upper], &all[row * 4].word[upper + 2], k, decode);
      const float y = operand<kPack>(&all[column * 4].word[4], &all[column * 4].word[5], k, decode);
      total += static_cast<double>(x) * static_cast<double>(y);
    }
    d[i] = static_cast<float>(total);
  }
}

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply<2>(d, a, b, [](std::uint32_t word, int i) {
    return to_float(bfloat16{static_cast<std::uint16_t>(word >> (16 * i))});
  });
}
inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply<2>(d, a, b, [](std::uint32_t word, int i) {
    return to_float(float16{static_cast<std::uint16_t>(word >> (16 * i))});
  });
}
inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply<1>(d, a, b, [](std::uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); });
}

// ldmatrix: lane 8 m + r names row r of matrix m; every lane gets elements 2 (lane % 4) and the next of row lane / 4.
template <int kMatrices>
void load_matrix(std::uint32_t (&r)[kMatrices], const void* row, bool transposed) {
  if (emulation::self.lane < 8 * kMatrices) emulation::expect_aligned(row, 16);
  const emulation::Words* all = emulation::exchange(emulation::to_words(row));
  const int lane = emulation::self.lane;
  for (int m = 0; m < kMatrices; ++m) {
    std::uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int major = lane / 4, minor = lane % 4 * 2 + i;
      const void* source = emulation::from_words<const void*>(all[8 * m + (transposed ? minor : major)]);
      pair[i] = static_cast<const std::uint16_t*>(source)[transposed ? major : minor];
    }
    r[m] = pair[0] | std::uint32_t{pair[1]} << 16;
  }
}
inline void load_matrix_x1(std::uint32_t (&r)[1], const void* row) { load_matrix(r, row, false); }
inline void load_matrix_x2(std::uint32_t (&r)[2], const void* row) { load_matrix(r, row, false); }
inline void load_matrix_x4(std::uint32_t (&r)[4], const void* row) { load_matrix(r, row, false); }
inline void load_matrix_x2_transposed(std::uint32_t (&r)[2], const void* row) { load_matrix(r, row, true); }
inline void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row) { load_matrix(r, row, true); }

inline void barrier_sync(int id, int threads) {
  emulation::Block& block = *emulation::self.block;
  emulation::expect(id > 0 && id < 16 && threads > 0 && threads % 32 == 0,
                    "named barriers are 1 to 15, of whole warps");
  {
    const std::lock_guard<std::mutex> lock(block.mutex);
    if (!block.named[id]) {
      block.named[id] = std::make_unique<std::barrier<>>(threads);
      block.named_threads[id] = threads;
    }
    emulation::expect(block.named_threads[id] == threads, "a named barrier has one number of threads");
  }
  block.named[id]->arrive_and_wait();
}

inline void prefetch_l2(const void*) {}
inline void dependency_wait() {}
inline void dependency_launch() {}

}  // namespace gear::cuda
