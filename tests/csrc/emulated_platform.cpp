// The emulation itself: what warps exchange, tensor-core layouts, asynchronous copies, early exits.
#include <cmath>

#include "cuda/platform.cuh"
#include "emulated.h"

namespace {

using gear::emulated::check;
using gear::emulated::normal;
using namespace gear;
using namespace gear::cuda;

constexpr unsigned kAll = 0xffffffffu;

__global__ void exchanges(int* out) {
  const int i = threadIdx.x, lane = i % 32;
  bool right = __shfl_sync(kAll, i, 3) == i - lane + 3;
  right = right && __shfl_xor_sync(kAll, i, 5) == (i ^ 5);
  right = right && __shfl_down_sync(kAll, i, 4) == (lane < 28 ? i + 4 : i);
  right = right && __shfl_up_sync(kAll, i, 4) == (lane >= 4 ? i - 4 : i);
  right = right && __shfl_sync(kAll, i, 1, 8) == i - lane % 8 + 1;
  right = right && __ballot_sync(kAll, lane % 3 == 0) == 0x49249249u;
  right = right && __reduce_add_sync(kAll, lane) == 496 && __reduce_max_sync(kAll, lane) == 31;
  right = right && __all_sync(kAll, lane < 32) && !__any_sync(kAll, lane > 31);
  right = right && __syncthreads_count(i % 2) == 32 && __syncthreads_or(i == 9) && !__syncthreads_and(i != 9);
  out[i] = right;
}

// A[16][K] B[K][8]: every operand is fetched from shared memory by load_matrix or by its documented layout.
__global__ void products(const float* a, const float* b, float* d) {
  __shared__ bfloat16 rows[16 * 16], columns[16 * 8];
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  for (int i = lane; i < 256; i += 32) rows[i] = from_float<bfloat16>(a[i]);
  for (int i = lane; i < 128; i += 32) columns[i] = from_float<bfloat16>(b[i]);
  __syncthreads();
  std::uint32_t x[4], y[2], z[2];
  load_matrix_x4(x, rows + lane % 16 * 16 + lane / 16 * 8);
  load_matrix_x2_transposed(y, columns + lane % 16 * 8);
  for (int i = 0; i < 2; ++i) {
    const int k = pair + 8 * i;
    z[i] = columns[k * 8 + group].bits | std::uint32_t{columns[(k + 1) * 8 + group].bits} << 16;
  }
  float sums[4] = {}, tf32[4] = {};
  mma_bf16(sums, x, y);
  check(y[0] == z[0] && y[1] == z[1], "transposed load");
  for (int k = 0; k < 16; k += 8) {
    std::uint32_t u[4], v[2];
    for (int i = 0; i < 4; ++i)
      u[i] = __float_as_uint(to_float(rows[(group + i % 2 * 8) * 16 + k + lane % 4 + i / 2 * 4]));
    for (int i = 0; i < 2; ++i) v[i] = __float_as_uint(to_float(columns[(k + lane % 4 + i * 4) * 8 + group]));
    mma_tf32(tf32, u, v);
  }
  for (int i = 0; i < 4; ++i) {
    check(std::fabs(sums[i] - tf32[i]) < 1e-5f, "bf16 and tf32 products of the same numbers");
    d[(group + i / 2 * 8) * 8 + pair + i % 2] = sums[i];
  }
}

// Two stages in flight; half of the threads leave early, one row is short.
__global__ void copies(const float* in, float* out, int stages) {
  float* ring = dynamic_shared<float>();  // [2][32][4]
  const int i = threadIdx.x;
  if (i >= 32) return;
  for (int stage = 0; stage <= stages; ++stage) {
    if (stage == 1) check(ring[i * 4] != ring[i * 4], "a copy is not seen before it was waited for");
    if (stage < stages) copy_async<16>(ring + (stage % 2 * 32 + i) * 4, in + (stage * 32 + i) * 4, i == 7 ? 8 : 16);
    copy_async_commit();
    if (stage == 0) continue;
    copy_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) out[((stage - 1) * 32 + i) * 4 + j] = ring[((stage - 1) % 2 * 32 + (i ^ 1)) * 4 + j];
    __syncthreads();
  }
  copy_async_wait<0>();
}

__global__ void sums(float* total, int* order) {
  atomicAdd(total, 0.5f);
  if (threadIdx.x < 64) {
    if (threadIdx.x == 3) order[0] = 1;
    barrier_sync(1, 64);
    if (threadIdx.x == 40) order[1] = order[0] + 1;
  }
}

// What a kernel sees that looks at its input too early. One thread: of two, one would read what the other's wait
// writes.
__global__ void early_and_late(const float* in, float* early, float* late) {
  prefetch_l2(in);
  *early = *in;
  dependency_wait();
  *late = *in;
}

}  // namespace

GEAR_CASE(late_inputs) {
  float in = 3.0f, early = 0.0f, late = 0.0f;
  gear::emulation::asked_ahead = 0;
  gear::emulation::arrive_late(&in, sizeof in);
  launch("early_and_late", {1, 1, 0, nullptr, true}, early_and_late, &in, &early, &late);
  check(early != early && late == 3.0f, "the input is there after the wait only");
  check(gear::emulation::asked_ahead.exchange(0) == 1, "one prefetch before the wait");
  gear::emulation::arrive_late(&in, sizeof in);
  launch("early_and_late", {1, 1}, early_and_late, &in, &early, &late);
  check(early == 3.0f, "a launch that is not dependent starts when the one before has ended");
}

GEAR_CASE(warp_exchanges) {
  std::vector<int> out(64);
  launch("exchanges", {1, 64}, exchanges, out.data());
  for (const int right : out) check(right == 1, "shuffles, votes and reductions");
}

GEAR_CASE(tensor_core_products) {
  const std::vector<float> a = normal(256, 1), b = normal(128, 2);
  std::vector<float> d(128);
  launch("products", {1, 32}, products, a.data(), b.data(), d.data());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float total = 0.0f;
      for (int k = 0; k < 16; ++k)
        total += to_float(from_float<bfloat16>(a[row * 16 + k])) * to_float(from_float<bfloat16>(b[k * 8 + column]));
      check(std::fabs(total - d[row * 8 + column]) < 1e-5f, "product");
    }
  }
}

GEAR_CASE(asynchronous_copies) {
  const std::vector<float> in = normal(3 * 128, 3);
  std::vector<float> out(3 * 128);
  launch("copies", {1, 64, 2 * 128 * sizeof(float)}, copies, in.data(), out.data(), 3);
  for (int i = 0; i < 3 * 128; ++i) {
    const int from = i ^ 4, row = from / 4 % 32;
    check(out[i] == (row == 7 && from % 4 >= 2 ? 0.0f : in[from]), "copied");
  }
}

GEAR_CASE(atomics_and_named_barriers) {
  float total = 0.0f;
  int order[2] = {};
  launch("sums", {3, 96}, sums, &total, order);
  check(total == 144.0f && order[1] == 2, "atomics, named barriers");
}

// Every finite number survives; halves between neighbours go to the even one, anything beside them to the nearer one.
template <class T>
void conversions(int count, int step) {
  using Bits = decltype(T::bits);
  const int sign = sizeof(T) == 1 ? 0x80 : 0x8000;
  for (int code = 0; code + 1 < count; code += step) {
    const float low = to_float(T{static_cast<Bits>(code)}), high = to_float(T{static_cast<Bits>(code + 1)});
    const float half = low + (high - low) / 2.0f;
    check(from_float<T>(low).bits == code && from_float<T>(-low).bits == (code | sign), "representable");
    check(from_float<T>(half).bits == code + code % 2, "half way");
    check(from_float<T>(std::nextafter(half, -1.0f)).bits == code, "below half way");
    check(from_float<T>(std::nextafter(half, INFINITY)).bits == code + 1, "above half way");
  }
}

GEAR_CASE(narrow_floats) {
  conversions<float8>(0x7f, 1);
  conversions<float16>(0x7c00, 1);
  conversions<bfloat16>(0x7f80, 7);
  const float inf = bits_float(0x7f800000), nan = bits_float(0x7fc00000);
  check(from_float<float8>(1e9f).bits == 0x7e && from_float<float8>(-inf).bits == 0xfe, "e4m3 saturates");
  check(from_float<float16>(65519.0f).bits == 0x7bff && from_float<float16>(65520.0f).bits == 0x7c00, "fp16 overflows");
  check(from_float<bfloat16>(inf).bits == 0x7f80 && to_float(float16{0xfc00}) == -inf, "infinities");
  check(from_float<float8>(nan).bits == 0x7f && from_float<float16>(nan).bits == 0x7fff, "no number");
  check(std::isnan(to_float(float8{0xff})) && std::isnan(to_float(float16{0x7c01})), "no number");
}
