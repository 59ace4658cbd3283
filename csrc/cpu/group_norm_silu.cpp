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

inline Vec silu(Vec x) { return div(x, add(splat(1.0f), exp(sub(zero(), x)))); }

// silu for a result that is rounded to bf16: relative error below 2^-13, a sixteenth of that rounding. 2^f on [-1/2,
// 1/2] by its degree-4 minimax polynomial (4e-6); infinities of 1 + e^-x become zeros as in the exact form.
inline Vec silu_for_bf16(Vec x) {
#if defined(GEAR_ISA_avx512)
  const Vec t = mul(x, splat(-1.44269504088896341f));
  const Vec n = round(t);
  const Vec f = sub(t, n);
  Vec p = splat(9.6663700e-3f);
  p = fma(p, f, splat(5.5921980e-2f));
  p = fma(p, f, splat(2.4022349e-1f));
  p = fma(p, f, splat(6.9312105e-1f));
  p = fma(p, f, splat(1.0f));
  return mul(x, _mm512_rcp14_ps(add(splat(1.0f), _mm512_scalef_ps(p, n))));
#else
  return silu(x);
#endif
}

inline void finish_silu(float* y, Vec x) { store_rounded(y, silu(x)); }
inline void finish_silu(bf16* y, Vec x) { store_rounded(y, silu_for_bf16(x)); }

template <bool kSilu, class X, class Y>
void row_loop(const ScaledRows& call, std::int64_t row) {
  const X* x = static_cast<const X*>(call.x) + row * call.width * call.channels;
  Y* y = static_cast<Y*>(call.y) + row * call.width * call.channels;
  for (std::int64_t pixel = 0; pixel < call.width; ++pixel, x += call.channels, y += call.channels)
    for (std::int64_t c = 0; c < call.channels; c += kLanes) {
      const Vec normed = fma(load(x + c), load(call.scale + c), load(call.shift + c));
      if constexpr (kSilu)
        finish_silu(y + c, normed);
      else
        store_rounded(y + c, normed);
    }
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
