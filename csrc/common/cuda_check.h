// Turns a CUDA error into an exception that names the call; Python sees a RuntimeError.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace gear::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// After a launch: bad configurations are reported at once, faults by a later call.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace gear::cuda
