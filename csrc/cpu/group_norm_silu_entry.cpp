#include <cmath>
#include <vector>

#include "cpu/group_norm_silu.h"
#include "cpu/parallel.h"

namespace gear::cpu {

void group_norm_silu(const void* x, int x_type, void* y, int y_type, std::int64_t rows, std::int64_t width,
                     std::int64_t channels, const double* moments, std::int64_t moment_rows, std::int64_t groups,
                     const float* weight, const float* bias, double eps, bool silu) {
  const std::int64_t per_group = channels / groups;
  const double count = static_cast<double>(moment_rows * width * per_group);
  std::vector<float> scale(static_cast<std::size_t>(channels)), shift(static_cast<std::size_t>(channels));
  for (std::int64_t group = 0; group < groups; ++group) {
    // Rows are added in order, so the result does not depend on who summed them.
    double sum = 0, squares = 0;
    for (std::int64_t row = 0; row < moment_rows; ++row) {
      sum += moments[(row * groups + group) * 2];
      squares += moments[(row * groups + group) * 2 + 1];
    }
    const double mean = sum / count;
    const double variance = squares / count - mean * mean;
    const double inverse = 1.0 / std::sqrt((variance > 0 ? variance : 0.0) + eps);
    for (std::int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
      const double factor = inverse * (weight != nullptr ? weight[c] : 1.0f);
      scale[static_cast<std::size_t>(c)] = static_cast<float>(factor);
      shift[static_cast<std::size_t>(c)] = static_cast<float>((bias != nullptr ? bias[c] : 0.0f) - mean * factor);
    }
  }
  const ScaledRows call{x, x_type, y, y_type, width, channels, scale.data(), shift.data(), silu};
  parallel_for(rows, [&](std::int64_t row) { GEAR_DISPATCH(scale_shift_row)(call, row); });
}

}  // namespace gear::cpu
