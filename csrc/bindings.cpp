// The Python module gear_engine._C: one line per op, sorted by name. See common/bind.h.
#include "common/bind.h"
#include "cpu/codebook_quantize.h"
#include "cpu/conv_rows.h"
#include "cpu/decode_attention.h"
#include "cpu/decode_step.h"
#include "cpu/decode_steps.h"
#include "cpu/dual_readout.h"
#include "cpu/group_norm_silu.h"
#include "cpu/isa.h"
#include "cpu/multiply_rate.h"
#include "cpu/parallel.h"
#include "cpu/residual_moments.h"
#include "cpu/sample_tokens.h"
#include "cpu/sign_bits.h"
#include "cpu/skinny_linear.h"
#include "cpu/soft_readout.h"
#include "cpu/torch_exponential.h"

#ifdef GEAR_WITH_CUDA
#include "cuda_bindings.h"
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = GEAR_VERSION;
  info["compiler"] = __VERSION__;
  info["sanitize"] = GEAR_SANITIZE;
#ifdef GEAR_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using gear::op;
  m.doc() = "Compiled kernels of gear_engine. Call them through gear_engine.ops, which checks the arguments.";
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return gear::isa_name(gear::isa()); });
  m.def("best_cpu_isa", [] { return gear::isa_name(gear::best_isa()); });
  m.def("set_cpu_isa", &gear::set_isa);
  m.def("allow_cpu_extension", &gear::allow_extension);
  m.def("set_num_threads", &gear::set_num_threads);

  op(m, "codebook_quantize_cpu", &gear::cpu::codebook_quantize);
  op(m, "conv_rows_cpu", &gear::cpu::conv_rows);
  op(m, "conv_rows_pack_cpu", &gear::cpu::conv_rows_pack);
  op(m, "decode_attention_cpu", &gear::cpu::decode_attention);
  op(m, "decode_step_cpu", &gear::cpu::decode_step);
  op(m, "decode_steps_cpu", &gear::cpu::decode_steps);
  op(m, "dual_readout_backward_cpu", &gear::cpu::dual_readout_backward);
  op(m, "group_norm_silu_cpu", &gear::cpu::group_norm_silu);
  op(m, "multiply_rate_cpu", &gear::cpu::multiply_rate);
  op(m, "philox_cpu", &gear::cpu::philox_noise);
  op(m, "residual_moments_cpu", &gear::cpu::residual_moments);
  op(m, "sample_tokens_cpu", &gear::cpu::sample_tokens);
  op(m, "sign_bits_cpu", &gear::cpu::sign_bits);
  op(m, "skinny_linear_cpu", &gear::cpu::skinny_linear);
  op(m, "soft_readout_cpu", &gear::cpu::soft_readout);
  op(m, "torch_exponential_cpu", &gear::cpu::torch_exponential);
  op(m, "winograd_rows_cpu", &gear::cpu::winograd_rows);
  op(m, "winograd_rows_pack_cpu", &gear::cpu::winograd_rows_pack);

#ifdef GEAR_WITH_CUDA
  gear::bind_cuda(m);
#endif
}
