#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gear {
namespace {

// Long enough to bridge the serial parts of a decode step, short enough not to burn a core between steps.
constexpr int kSpins = 3000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

thread_local bool inside_task = false;

// One job at a time. `gate_` holds whether the job is open (bit 0) and how many workers are in it (the rest). A worker
// enters by adding 2 while the gate is open; the caller closes it when no task is left and waits for the workers
// inside. A worker that wakes late finds the gate shut and goes back to waiting: nobody waits for it.
//
// The first exception out of a task is kept; the caller, alone again, throws it.
class Pool {
 public:
  explicit Pool(int n_threads) {
    for (int i = 1; i < n_threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stop_ = true;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  void run(std::int64_t n_tasks, TaskFunction function, void* body) {
    function_ = function;
    body_ = body;
    n_tasks_ = n_tasks;
    next_.store(0, std::memory_order_relaxed);
    gate_.store(1, std::memory_order_release);
    // Sequentially consistent against `sleepers_`: either the sleeper sees the new epoch or we see the sleeper.
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
      }
      wake_.notify_all();
    }
    drain();
    gate_.fetch_and(~std::uint64_t{1}, std::memory_order_acq_rel);
    for (int spins = 0; gate_.load(std::memory_order_acquire) != 0; ++spins) {
      spins < kSpins ? relax() : std::this_thread::yield();
    }
    if (failed_.load(std::memory_order_relaxed)) {
      failed_.store(false, std::memory_order_relaxed);
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

 private:
  void drain() noexcept {
    inside_task = true;
    try {
      for (;;) {
        const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
        if (task >= n_tasks_) break;
        function_(body_, task);
      }
    } catch (...) {
      next_.store(n_tasks_, std::memory_order_relaxed);  // what is left of the job is of no use
      if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
    }
    inside_task = false;
  }

  bool enter() {
    std::uint64_t gate = gate_.load(std::memory_order_relaxed);
    while ((gate & 1) != 0) {
      if (gate_.compare_exchange_weak(gate, gate + 2, std::memory_order_acquire, std::memory_order_relaxed))
        return true;
    }
    return false;
  }

  // Returns when the epoch is no longer `seen`.
  std::uint64_t wait_for_epoch(std::uint64_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      const std::uint64_t now = epoch_.load(std::memory_order_acquire);
      if (now != seen) return now;
      relax();
    }
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return epoch_.load() != seen; });
    sleepers_.fetch_sub(1);
    return epoch_.load();
  }

  void work() {
    std::uint64_t seen = 0;
    for (;;) {
      seen = wait_for_epoch(seen);
      if (stop_.load(std::memory_order_relaxed)) return;
      if (!enter()) continue;
      drain();
      gate_.fetch_sub(2, std::memory_order_release);
    }
  }

  TaskFunction function_ = nullptr;
  void* body_ = nullptr;
  std::int64_t n_tasks_ = 0;
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<std::uint64_t> gate_{0};
  alignas(64) std::atomic<std::uint64_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // written by who sets `failed_`, read behind the gate
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

struct State {
  std::mutex mutex;  // held by the thread that uses the pool
  std::unique_ptr<Pool> pool;
  std::atomic<int> n_threads{static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))};
};

// Never destroyed: threads may still wait on it when the process ends.
std::atomic<State*> global_state{nullptr};

State& state() {
  static const bool made = [] {
    global_state.store(new State);
    // A child of fork() has none of our threads; it leaves the parent's pool alone and starts another.
    pthread_atfork(nullptr, nullptr, [] {
      State* fresh = new State;
      fresh->n_threads.store(global_state.load()->n_threads.load());
      global_state.store(fresh);
      inside_task = false;
    });
    return true;
  }();
  (void)made;
  return *global_state.load();
}

void run_inline(std::int64_t n_tasks, TaskFunction function, void* body) {
  for (std::int64_t task = 0; task < n_tasks; ++task) function(body, task);
}

}  // namespace

void set_num_threads(int n_threads) { state().n_threads.store(std::max(1, n_threads)); }

int num_threads() { return state().n_threads.load(); }

void run_tasks(std::int64_t n_tasks, TaskFunction function, void* body) {
  if (n_tasks <= 0) return;
  State& current = state();
  const int n_threads = current.n_threads.load(std::memory_order_relaxed);
  if (n_tasks == 1 || n_threads == 1 || inside_task) return run_inline(n_tasks, function, body);
  std::unique_lock<std::mutex> lock(current.mutex, std::try_to_lock);
  if (!lock.owns_lock()) return run_inline(n_tasks, function, body);
  if (!current.pool || current.pool->size() != n_threads) {
    current.pool.reset();
    current.pool = std::make_unique<Pool>(n_threads);
  }
  current.pool->run(n_tasks, function, body);
}

}  // namespace gear
