// skinny_linear: values against a plain loop, and a row's bits in every number of rows.
#include "cuda/skinny_linear.h"

#include <cmath>
#include <cstring>
#include <string>

#include "common/narrow_floats.h"
#include "device.h"
#include "emulated.h"

namespace {

using gear::bfloat16;
using gear::float16;
using gear::emulated::check;
using gear::emulated::Device;
using gear::emulated::normal;

template <class T>
constexpr int kDtype = 0;
template <>
constexpr int kDtype<bfloat16> = 1;
template <>
constexpr int kDtype<float16> = 2;
template <class T>
constexpr double kTolerance = 1e-6;
template <>
constexpr double kTolerance<bfloat16> = 2e-2;
template <>
constexpr double kTolerance<float16> = 2e-3;

struct Size {
  std::int64_t rows, in, out;
};
struct Parts {
  bool norm, gate, residual, f32_output = false;
};
constexpr Parts kPlain{false, false, false}, kAll{true, true, true};

template <class T>
std::vector<T> numbers(std::int64_t n, unsigned seed, float scale = 1.0f, float offset = 0.0f) {
  std::vector<T> narrow;
  for (const float x : normal(static_cast<std::size_t>(n), seed))
    narrow.push_back(gear::from_float<T>(offset + scale * x));
  return narrow;
}

template <class T>
struct Layer {
  explicit Layer(const Size& size)
      : x(numbers<T>(size.rows * size.in, 1)),
        weight(numbers<T>(size.in * size.out, 2, 1.0f / std::sqrt(static_cast<float>(size.in)))),
        gate(numbers<T>(size.in * size.out, 3, 1.0f / std::sqrt(static_cast<float>(size.in)))),
        norm(numbers<T>(size.in, 4, 0.1f, 1.0f)),
        residual(numbers<T>(size.rows * size.out, 5)) {}
  std::vector<T> x, weight, gate, norm, residual;
};

// The kernel's result in fp32, for the first `rows` rows of the layer's input. With `overlap` the input is written by
// the kernel before, here the same layer with the unit matrix: it may still be running.
template <class T>
std::vector<float> run(const Layer<T>& layer, const Size& size, const Parts& parts, bool overlap = false) {
  std::vector<T> some(layer.x.begin(), layer.x.begin() + size.rows * size.in);
  const std::vector<T> added(layer.residual.begin(), layer.residual.begin() + size.rows * size.out);
  const Device<T> x(some), weight(layer.weight), gate(layer.gate), norm(layer.norm), residual(added);
  const Device<T> y(static_cast<std::size_t>(size.rows * size.out));
  const Device<float> wide(static_cast<std::size_t>(size.rows * size.out));
  const Device<char> workspace(gear::cuda::skinny_linear_workspace(kDtype<T>, size.rows, size.in, parts.norm));
  std::vector<T> unit(static_cast<std::size_t>(overlap ? size.in * size.in : 0));
  for (std::size_t i = 0; i < unit.size(); i += static_cast<std::size_t>(size.in) + 1) unit[i] = gear::from_float<T>(1);
  const Device<T> before(some), same(unit);
  if (overlap) {
    gear::cuda::skinny_linear(before.data(), kDtype<T>, size.rows, size.in, size.in, nullptr, 0.0f, same.data(),
                              nullptr, nullptr, x.data(), false, nullptr, false, nullptr);
    gear::emulated::arrive_late(x, some.size());
  }
  gear::cuda::skinny_linear(x.data(), kDtype<T>, size.rows, size.in, size.out, parts.norm ? norm.data() : nullptr,
                            1e-5f, weight.data(), parts.gate ? gate.data() : nullptr,
                            parts.residual ? residual.data() : nullptr,
                            parts.f32_output ? static_cast<void*>(wide.data()) : y.data(), parts.f32_output,
                            workspace.data(), overlap, nullptr);
  if (overlap) check(gear::emulated::has_asked_ahead(), "weights are asked for before the kernel waits");
  if (parts.f32_output) return wide.values();
  std::vector<float> result;
  for (const T value : y.values()) result.push_back(gear::to_float(value));
  return result;
}

template <class T>
double dot(const T* x, const T* weight, std::int64_t n) {
  double total = 0.0;
  for (std::int64_t k = 0; k < n; ++k) total += double{gear::to_float(x[k])} * double{gear::to_float(weight[k])};
  return total;
}

template <class T>
std::vector<double> expected(const Layer<T>& layer, const Size& size, const Parts& parts) {
  std::vector<double> result;
  for (std::int64_t row = 0; row < size.rows; ++row) {
    std::vector<T> x(layer.x.begin() + row * size.in, layer.x.begin() + (row + 1) * size.in);
    if (parts.norm) {
      const auto scale = static_cast<float>(1.0 / std::sqrt(dot(x.data(), x.data(), size.in) / double(size.in) + 1e-5));
      for (std::int64_t k = 0; k < size.in; ++k) {
        const float rounded = gear::to_float(gear::from_float<T>(gear::to_float(x[k]) * scale));
        x[k] = gear::from_float<T>(rounded * gear::to_float(layer.norm[k]));
      }
    }
    for (std::int64_t o = 0; o < size.out; ++o) {
      double value = dot(x.data(), &layer.weight[o * size.in], size.in);
      if (parts.gate) value *= dot(x.data(), &layer.gate[o * size.in], size.in) / (1.0 + std::exp(-value));
      if (parts.residual) value += double{gear::to_float(layer.residual[row * size.out + o])};
      result.push_back(value);
    }
  }
  return result;
}

template <class T>
void values(const Size& size, const Parts& parts, bool overlap = false) {
  const Layer<T> layer(size);
  const std::vector<float> found = run(layer, size, parts, overlap);
  const std::vector<double> right = expected(layer, size, parts);
  double error = 0.0, largest = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    check(std::isfinite(found[i]), "finite");
    error = std::fmax(error, std::fabs(found[i] - right[i]));
    largest = std::fmax(largest, std::fabs(right[i]));
  }
  check(error <= kTolerance<T> * largest, "linear layer against a plain loop");
}

// Rows alone and in every bucket of `sizes`.
template <class T>
void bits(std::int64_t in, std::int64_t out, const Parts& parts, const std::vector<std::int64_t>& sizes) {
  const Layer<T> layer({sizes.back(), in, out});
  const std::vector<float> all = run(layer, {sizes.back(), in, out}, parts);
  for (const std::int64_t rows : sizes) {
    if (rows == sizes.back()) continue;
    const std::vector<float> some = run(layer, {rows, in, out}, parts);
    check(std::memcmp(some.data(), all.data(), some.size() * sizeof(float)) == 0, "a row's bits in every bucket");
  }
}

}  // namespace

// Inputs that the kernel before has not written yet, by every kernel, with the norm inside and before.
GEAR_CASE(skinny_linear_overlap) {
  values<bfloat16>({1, 24, 3}, {true, false, false}, true);
  values<float16>({17, 24, 3}, {true, true, false}, true);
  values<float>({1, 24, 3}, {true, false, false}, true);
  values<float>({5, 24, 3}, {false, true, true}, true);
}

// The least that each kernel does, for planted defects.
GEAR_CASE(skinny_linear_narrow) { values<bfloat16>({9, 600, 16}, {true, true, false}); }

GEAR_CASE(skinny_linear_wide) { values<bfloat16>({17, 328, 16}, kPlain); }

GEAR_CASE(skinny_linear_f32_few) { values<float>({1, 600, 16}, kPlain); }

GEAR_CASE(skinny_linear) {
  values<bfloat16>({2, 72, 20}, kAll);
  values<bfloat16>({9, 100, 37}, {true, false, true});  // rows that are not multiples of 16 bytes
  values<bfloat16>({17, 136, 33}, {true, true, false});
  values<bfloat16>({35, 7, 1}, kPlain);
  values<bfloat16>({65, 8, 5}, {true, false, true});            // a second block of rows
  values<bfloat16>({1, 600, 16}, {false, false, false, true});  // segments of two chunks, and a short one
}

GEAR_CASE(skinny_linear_f16) {
  values<float16>({3, 80, 17}, kAll);
  values<float16>({33, 65, 70}, {false, false, true, true});
}

GEAR_CASE(skinny_linear_f32) {
  values<float>({1, 72, 20}, kAll);
  values<float>({5, 301, 19}, {true, false, true});
  values<float>({17, 260, 5}, {true, true, false});
}

GEAR_CASE(skinny_linear_bits) {
  bits<bfloat16>(136, 16, {true, false, true}, {3, 64});
  bits<bfloat16>(640, 16, {false, true, false}, {2, 17});  // segments of two chunks
  bits<float>(72, 4, kPlain, {3, 5});
}
