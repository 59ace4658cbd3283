// codebook_quantize on a GPU; arguments and result as gear::cpu::codebook_quantize, on the given stream.
#pragma once

#include <cstdint>

namespace gear::cuda {
void codebook_quantize(const float* z, const float* z2, const float* codebook, const float* e2, int64_t n, int64_t k,
                       int64_t d, int metric, int64_t* indices, float* quantized, void* stream);
}  // namespace gear::cuda
