// Which instruction set the CPU kernels use, chosen at run time.
//
// A file listed in GEAR_CPU_ISA_SOURCES is compiled once per instruction set. It wraps everything in
//
//     namespace gear::GEAR_ISA { void my_op(...) { ... } }
//
// and uses intrinsics under `#if GEAR_ISA_avx512` / `#elif GEAR_ISA_avx2` (or plain loops, which the compiler
// vectorises for each). A file compiled once holds the entry point, which picks the variant:
//
//     GEAR_DECLARE_ISA(void, my_op, (const float* x, int64_t n))
//     namespace gear::cpu { void my_op(const float* x, int64_t n) { GEAR_DISPATCH(my_op)(x, n); } }
//
// Extensions beyond a level's baseline (VNNI, bf16 dot products, AMX) are asked for by has_*(), which answer false
// below the avx512 level, and used in functions marked __attribute__((target(...))).
#pragma once

#include <cstdint>

namespace gear {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// The level in force: the best of the machine, or what GEAR_CPU_ISA or set_isa() asked for.
Isa isa();
// The best level of this machine: avx2 means AVX2, FMA, F16C and BMI2; avx512 adds AVX-512 F, BW, DQ and VL.
Isa best_isa();
// Sets the level by name; throws std::invalid_argument if the name is unknown or the machine lacks it.
void set_isa(const char* name);
const char* isa_name(Isa level);

// Forbids an extension ("vnni", "bf16" or "amx") or allows it again, so that tests reach the code without it; throws
// std::invalid_argument for another name.
void allow_extension(const char* name, bool allowed);

bool has_avx512_vnni();
bool has_avx512_bf16();
bool has_amx_bf16();  // also asks the operating system for the tile registers
bool has_amx_int8();

}  // namespace gear

#ifdef GEAR_X86
#define GEAR_DECLARE_ISA(result, name, parameters) \
  namespace gear::portable {                       \
  result name parameters;                          \
  }                                                \
  namespace gear::avx2 {                           \
  result name parameters;                          \
  }                                                \
  namespace gear::avx512 {                         \
  result name parameters;                          \
  }
#define GEAR_DISPATCH(name)                                    \
  (::gear::isa() == ::gear::Isa::avx512 ? ::gear::avx512::name \
   : ::gear::isa() == ::gear::Isa::avx2 ? ::gear::avx2::name   \
                                        : ::gear::portable::name)
#else
#define GEAR_DECLARE_ISA(result, name, parameters) \
  namespace gear::portable {                       \
  result name parameters;                          \
  }
#define GEAR_DISPATCH(name) (::gear::portable::name)
#endif
