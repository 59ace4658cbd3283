// The elementwise half of GroupNorm + SiLU: y = silu(x * scale + shift), channels last.
//
// The statistics come as sums (residual_moments.cpp takes them while it writes x), so x is read once and y written
// once: as torch composes it, the tensor is read three times and written twice. Source of the idea: fused NHWC
// GroupNorm + SiLU of diffusion servers (sglang, TensorRT).
#include "cpu/group_norm_silu.h"

#include "cpu/simd.h"
#include "cpu/simd_bf16.h"

namespace gear::GEAR_ISA {
namespace {

template <bool kSilu>
inline Vec activate(Vec x) {
  if constexpr (!kSilu) return x;
  return div(x, add(splat(1.0f), exp(sub(zero(), x))));
}

template <bool kSilu, class X, class Y>
void row_loop(const ScaledRows& call, std::int64_t row) {
  const X* x = static_cast<const X*>(call.x) + row * call.width * call.channels;
  Y* y = static_cast<Y*>(call.y) + row * call.width * call.channels;
  for (std::int64_t pixel = 0; pixel < call.width; ++pixel, x += call.channels, y += call.channels)
    for (std::int64_t c = 0; c < call.channels; c += kLanes)
      store_rounded(y + c, activate<kSilu>(fma(load(x + c), load(call.scale + c), load(call.shift + c))));
}

template <class X, class Y>
void by_activation(const ScaledRows& call, std::int64_t row) {
  call.silu ? row_loop<true, X, Y>(call, row) : row_loop<false, X, Y>(call, row);
}

}  // namespace

void scale_shift_row(const ScaledRows& call, std::int64_t row) {
  if (call.x_type == 0)
    call.y_type == 0 ? by_activation<float, float>(call, row) : by_activation<float, bf16>(call, row);
  else
    call.y_type == 0 ? by_activation<bf16, float>(call, row) : by_activation<bf16, bf16>(call, row);
}

}  // namespace gear::GEAR_ISA
