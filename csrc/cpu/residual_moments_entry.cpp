#include "cpu/parallel.h"
#include "cpu/residual_moments.h"

namespace gear::cpu {

void residual_moments(const void* source, int source_type, float* residual, bool accumulate, int phase_offset,
                      double* moments, std::int64_t rows, std::int64_t width, std::int64_t channels,
                      std::int64_t groups) {
  const ResidualRows call{source, source_type, residual, accumulate, phase_offset, moments, width, channels, groups};
  parallel_for(rows, [&](std::int64_t row) { GEAR_DISPATCH(residual_moments_row)(call, row); });
}

}  // namespace gear::cpu
