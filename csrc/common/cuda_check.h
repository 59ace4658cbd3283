// Turns a CUDA error into an exception that names the call; Python sees a RuntimeError.
#pragma once

#ifndef GEAR_EMULATE_CUDA

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace gear::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace gear::cuda

#endif
