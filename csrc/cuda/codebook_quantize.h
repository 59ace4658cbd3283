// codebook_quantize on a GPU; arguments and result as gear::cpu::codebook_quantize, on the given stream.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gear::cuda {

// Bytes of device memory that a call needs beside its operands, aligned to 16.
std::size_t codebook_quantize_workspace(std::int64_t n, std::int64_t k, std::int64_t d, int metric);

void codebook_quantize(const float* z, const float* z2, const float* codebook, const float* e2, std::int64_t n,
                       std::int64_t k, std::int64_t d, int metric, std::int64_t* indices, float* quantized,
                       void* workspace, void* stream);

}  // namespace gear::cuda
