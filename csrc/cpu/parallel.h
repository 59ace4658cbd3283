// Fork-join over a persistent pool of threads.
//
//   gear::parallel_for(n_tasks, [&](std::int64_t task) { ... });
//
// runs the body once for every task in [0, n_tasks), on the calling thread and on the pool's, and returns when all are
// done. Tasks are handed out one at a time, so which thread runs a task is not fixed: a body must compute the same
// result wherever it runs, and only tasks with disjoint outputs may share a call.
//
// A body may throw (memory for what it keeps may run out): no further task is begun, those under way end, and the first
// exception is thrown to the caller. The pool serves the next call as ever.
//
// Threads wait by spinning for a short while (a decode step issues dozens of calls a few microseconds apart) and then
// sleep. A call from inside a body, and a call made while another thread uses the pool, runs its tasks in order on the
// calling thread. A child process made by fork() starts with a pool of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace gear {

using TaskFunction = void (*)(void* body, std::int64_t task);

// Number of threads that share the work of a call, the calling one included. At least 1.
void set_num_threads(int n_threads);
int num_threads();

void run_tasks(std::int64_t n_tasks, TaskFunction function, void* body);

template <typename Body>
void parallel_for(std::int64_t n_tasks, Body&& body) {
  using Decayed = std::remove_reference_t<Body>;
  run_tasks(
      n_tasks, [](void* erased, std::int64_t task) { (*static_cast<Decayed*>(erased))(task); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

}  // namespace gear
