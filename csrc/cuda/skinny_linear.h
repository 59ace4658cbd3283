// skinny_linear on a GPU; see ops/skinny_linear.py for the formula and csrc/cuda/skinny_linear.cu for the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gear::cuda {

// Bytes of device memory that a call needs beside its operands; `dtype` as below.
std::size_t skinny_linear_workspace(int dtype, std::int64_t rows, std::int64_t in_features, bool has_norm);

// dtype of x, norm_weight, weight, gate and residual: 0 fp32, 1 bf16, 2 fp16; y is of that dtype, or fp32 if
// f32_output. norm_weight, gate and residual may be null; residual may be y. All arrays are contiguous.
//
// `overlap`: the call may start while the kernel before it in the stream is still running, to fetch weights ahead. The
// caller vouches that this kernel does not write the weights or the gate.
void skinny_linear(const void* x, int dtype, std::int64_t rows, std::int64_t in_features, std::int64_t out_features,
                   const void* norm_weight, float norm_eps, const void* weight, const void* gate, const void* residual,
                   void* y, bool f32_output, void* workspace, bool overlap, void* stream);

}  // namespace gear::cuda
