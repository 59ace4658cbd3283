// A barrier of threads that orders memory among those who meet at it, and nobody else.
//
// std::barrier sleeps through a table that unrelated barriers of the library share, by atomic operations that order
// memory too: ThreadSanitizer then misses, now and then, that a kernel lacks a barrier.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace gear::emulation {

class Barrier {
 public:
  explicit Barrier(int threads) : expected_(threads), missing_(threads) {}

  void arrive_and_wait() {
    const std::uint32_t round = round_.load(std::memory_order_acquire);
    if (arrive()) return;
    for (int spin = 0; spin < 20; ++spin)
      if (round_.load(std::memory_order_acquire) != round) return;
    while (round_.load(std::memory_order_acquire) == round) futex(FUTEX_WAIT_PRIVATE, round);
  }

  // The thread counts as arrived now, and is not expected again.
  void arrive_and_drop() {
    expected_.fetch_sub(1, std::memory_order_relaxed);
    arrive();
  }

 private:
  // Whether this was the last one, who starts the next round.
  bool arrive() {
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) != 1) return false;
    missing_.store(expected_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    futex(FUTEX_WAKE_PRIVATE, INT_MAX);
    return true;
  }

  void futex(int operation, std::uint32_t value) {
    static_assert(sizeof(round_) == sizeof(std::uint32_t));
    syscall(SYS_futex, &round_, operation, value, nullptr, nullptr, 0);
  }

  std::atomic<int> expected_, missing_;
  std::atomic<std::uint32_t> round_{0};
};

}  // namespace gear::emulation
