// Blocks, warps and threads: what each holds, what lanes exchange, and the launch that runs them.
#pragma once

#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <source_location>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_emulation/barrier.h"
#include "cuda_emulation/language.h"

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
  Barrier barrier;
  Words exchange[2][32];
};

constexpr std::align_val_t kSharedAlignment{128};
struct FreeShared {
  void operator()(unsigned char* memory) const { ::operator delete[](memory, kSharedAlignment); }
};

struct Block {
  Block(int n, std::size_t shared_bytes, bool is_dependent) : threads(n), dependent(is_dependent), barrier(n) {
    for (int first = 0; first < n; first += 32)
      warps.push_back(std::make_unique<Warp>(n - first < 32 ? n - first : 32));
    shared.reset(new (kSharedAlignment) unsigned char[shared_bytes]);
    std::memset(shared.get(), 0xff, shared_bytes);
    if (__start_gear_shared != nullptr)
      std::memset(__start_gear_shared, 0xff, static_cast<std::size_t>(__stop_gear_shared - __start_gear_shared));
  }

  int threads;
  bool dependent;  // launched to start before the kernel before it has ended
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<unsigned char[], FreeShared> shared;
  std::mutex mutex;  // of the creation of named barriers
  std::unique_ptr<Barrier> named[16];
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
  bool waited = false;                    // for the kernel before
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

// What the kernel before still has to do, if a test made it late: done when somebody waits for it.
struct PreviousKernel {
  std::mutex mutex;
  std::function<void()> rest;

  void end() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (rest) std::exchange(rest, nullptr)();
  }
};
inline PreviousKernel previous_kernel;

// Copies and prefetches that dependent kernels asked for before they waited.
inline std::atomic<long> asked_ahead{0};

inline void count_ahead() {
  if (self.block->dependent && !self.waited) asked_ahead.fetch_add(1, std::memory_order_relaxed);
}

// What lies at `data` is there only when the next kernel has waited; until then it is NaN.
inline void arrive_late(void* data, std::size_t bytes) {
  std::vector<unsigned char> kept(bytes);
  std::memcpy(kept.data(), data, bytes);
  std::memset(data, 0xff, bytes);
  previous_kernel.rest = [data, kept = std::move(kept)] { std::memcpy(data, kept.data(), kept.size()); };
}

inline bool is_omitted(const std::source_location& at) {
  static const char* const omitted = std::getenv("GEAR_OMIT_BARRIER");
  if (omitted == nullptr) return false;
  const std::string place = std::string(at.file_name()) + ":" + std::to_string(at.line());
  const std::size_t length = std::strlen(omitted);
  return place.size() > length && place[place.size() - length - 1] == '/' && place.ends_with(omitted);
}

// Runs body() for every thread of every block; `shared_limit`: bytes of dynamic shared memory that the block can have.
template <class Body>
void run(dim3 grid, dim3 block, std::size_t shared, std::size_t shared_limit, bool dependent, const char* name,
         const Body& body) {
  const unsigned threads = block.x * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535 || shared > shared_limit) {
    std::fprintf(stderr, "emulated CUDA: %s: invalid launch\n", name);
    std::abort();
  }
  if (!dependent) previous_kernel.end();
  std::optional<Block> running;
  const auto next_block = [&]() noexcept { running.emplace(static_cast<int>(threads), shared, dependent); };
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
      expect(self.waited || !dependent, "ended without dependency_wait()");
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
