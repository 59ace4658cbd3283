// The CUDA part of the bindings: one line per op, sorted by name. tests/csrc/emulated_module.cpp binds the same
// functions compiled for the CPU.
#pragma once

#include "common/bind.h"
#include "cuda/codebook_quantize.h"
#include "cuda/decode_attention.h"
#include "cuda/sample_tokens.h"
#include "cuda/sign_bits.h"
#include "cuda/skinny_linear.h"

namespace gear {

inline void bind_cuda(pybind11::module_& m) {
  op(m, "codebook_quantize_cuda", &cuda::codebook_quantize);
  op(m, "codebook_quantize_workspace_cuda", &cuda::codebook_quantize_workspace);
  op(m, "decode_attention_cuda", &cuda::decode_attention);
  op(m, "sample_tokens_cuda", &cuda::sample_tokens);
  op(m, "sign_bits_cuda", &cuda::sign_bits);
  op(m, "skinny_linear_cuda", &cuda::skinny_linear);
  op(m, "skinny_linear_workspace_cuda", &cuda::skinny_linear_workspace);
}

}  // namespace gear
