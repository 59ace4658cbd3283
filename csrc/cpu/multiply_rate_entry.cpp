#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/multiply_rate.h"
#include "cpu/parallel.h"

namespace gear::cpu {

double multiply_rate(int multiplied, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr std::int64_t kSteps = 200000;  // a fraction of a millisecond
  const auto kind = static_cast<Multiplied>(multiplied);
  const int tasks = num_threads();
  std::vector<float> operands(static_cast<std::size_t>(tasks) * 64);
  for (std::size_t i = 0; i < operands.size(); ++i) operands[i] = static_cast<float>(i % 64);
  std::vector<double> made(static_cast<std::size_t>(tasks));
  double best = 0.0;
  for (const auto begin = Clock::now(); std::chrono::duration<double>(Clock::now() - begin).count() < seconds;) {
    const auto start = Clock::now();
    parallel_for(tasks, [&](std::int64_t task) {
      made[task] = GEAR_DISPATCH(multiply_steps)(kind, kSteps, &operands[task * 64]);
    });
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    double total = 0.0;
    for (const double each : made) total += each;
    best = std::max(best, 2.0 * total / elapsed);
  }
  return best;
}

}  // namespace gear::cpu
