// Binds a kernel's entry point to Python in one line, with no logic of its own.
//
//     op(m, "rmsnorm_cpu", &gear::cpu::rmsnorm);
//
// Pointers (data, streams) arrive as Python integers, everything else as itself; arguments are positional; the GIL is
// released during the call. Shapes, dtypes, devices and contiguity were checked by the caller in gear_engine/ops.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

namespace gear {

template <class T>
using Wire = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T from_wire(Wire<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <class Result, class... Arguments>
void op(pybind11::module_& module, const char* name, Result (*function)(Arguments...)) {
  module.def(
      name, [function](Wire<Arguments>... arguments) { return function(from_wire<Arguments>(arguments)...); },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace gear
