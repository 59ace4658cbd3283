// The CUDA part of the bindings: one line per op, sorted by name. tests/csrc/emulated_module.cpp binds the same
// functions compiled for the CPU.
#pragma once

#include "common/bind.h"
#include "cuda/codebook_quantize.h"
#include "cuda/decode_attention.h"
#include "cuda/sample_tokens.h"

namespace gear {

inline void bind_cuda(pybind11::module_& m) {
  op(m, "codebook_quantize_cuda", &cuda::codebook_quantize);
  op(m, "decode_attention_cuda", &cuda::decode_attention);
  op(m, "sample_tokens_cuda", &cuda::sample_tokens);
}

}  // namespace gear
