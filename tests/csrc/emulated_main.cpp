// PROGRAM [CASE...]: runs the named cases, or all of them, and prints a line for each. `emulated_<sanitizer>` runs the
// emulated kernels, `gpu_smoke` the real ones. Exit status: 0 all passed, 1 one failed or is not known, 2 no GPU.
#include <cstring>
#include <exception>

#include "common/cuda_check.h"
#include "emulated.h"

namespace {

// Why no kernel can run here, or nullptr.
const char* missing_device() {
#ifdef GEAR_EMULATE_CUDA
  return nullptr;
#else
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count == 0 ? "none is visible" : nullptr;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  if (const char* reason = missing_device()) {
    std::fprintf(stderr, "no CUDA device: %s\n", reason);
    return 2;
  }
  int found = 0;
  for (const gear::emulated::Case& one : gear::emulated::cases()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], one.name) == 0;
    if (!wanted) continue;
    try {
      one.run();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "failed: %s: %s\n", one.name, error.what());
      return 1;
    }
    std::printf("ok %s\n", one.name);
    std::fflush(stdout);
    ++found;
  }
  return found == 0 || found < argc - 1;
}
