// The functions that platform.cuh has for kernels: asynchronous copies, tensor cores, ldmatrix, named barriers.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <source_location>
#include <utility>

#include "common/host_device.h"
#include "common/narrow_floats.h"
#include "cuda_emulation/functions.h"
#include "cuda_emulation/threads.h"

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
  emulation::count_ahead();
  emulation::self.open.push_back({shared, global, kBytes, valid});
}
inline void copy_async_commit() {
  emulation::self.groups.push_back(std::move(emulation::self.open));
  emulation::self.open.clear();
}
template <int kPending>
void copy_async_wait(const std::source_location at = std::source_location::current()) {
  if (emulation::is_omitted(at)) return;
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
// A lane reads its row before it meets the others: the instruction orders no memory, so that what other lanes wrote
// there needs a barrier before.
template <int kMatrices>
void load_matrix(std::uint32_t (&r)[kMatrices], const void* row, bool transposed) {
  const int lane = emulation::self.lane;
  emulation::Words mine{};
  if (lane < 8 * kMatrices) {
    emulation::expect_aligned(row, 16);
    std::memcpy(&mine, row, 16);
  }
  const emulation::Words* all = emulation::exchange(mine);
  for (int m = 0; m < kMatrices; ++m) {
    std::uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int major = lane / 4, minor = lane % 4 * 2 + i;
      const int at = transposed ? major : minor;
      pair[i] = static_cast<std::uint16_t>(all[8 * m + (transposed ? minor : major)].word[at / 2] >> (16 * (at % 2)));
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
      block.named[id] = std::make_unique<emulation::Barrier>(threads);
      block.named_threads[id] = threads;
    }
    emulation::expect(block.named_threads[id] == threads, "a named barrier has one number of threads");
  }
  block.named[id]->arrive_and_wait();
}

inline void prefetch_l2(const void*) { emulation::count_ahead(); }
inline void dependency_wait(const std::source_location at = std::source_location::current()) {
  if (emulation::is_omitted(at)) return;
  emulation::self.waited = true;
  if (emulation::self.block->dependent) emulation::previous_kernel.end();
}
inline void dependency_launch() {}

}  // namespace gear::cuda
