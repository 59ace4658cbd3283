// How fast this machine multiplies: a ceiling for benchmarks, with operands and sums in registers.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gear {

enum class Multiplied : int { f32 = 0, bf16 = 1, int8 = 2 };

namespace cpu {

// Operations per second, a multiply-add being two, of all threads in the fastest of the runs that fit into `seconds`;
// 0 if there is no loop for such numbers and the instruction set (wider ones may stand in for them).
double multiply_rate(int multiplied, double seconds);

}  // namespace cpu
}  // namespace gear

// Multiply-adds that one thread has made in `steps` steps. `operands`: 64 floats, which the compiler does not know and
// which are overwritten.
GEAR_DECLARE_ISA(double, multiply_steps, (gear::Multiplied multiplied, std::int64_t steps, float* operands))
