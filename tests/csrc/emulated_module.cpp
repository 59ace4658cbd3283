// The CUDA kernels, compiled for the CPU, as a Python module: the op tests call it in place of gear_engine._C.
#include "cuda_bindings.h"

PYBIND11_MODULE(emulated, m) { gear::bind_cuda(m); }
