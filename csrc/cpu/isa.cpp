#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(GEAR_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gear {
namespace {

constexpr int kUnset = -1;
std::atomic<int> current{kUnset};

constexpr const char* kExtensions[] = {"vnni", "bf16", "amx"};
enum Extension : unsigned { kVnni = 1, kBf16 = 2, kAmx = 4 };
std::atomic<unsigned> forbidden{0};

[[maybe_unused]] bool usable(Extension extension) {
  return isa() == Isa::avx512 && (forbidden.load(std::memory_order_relaxed) & extension) == 0;
}

#ifdef GEAR_X86
Isa detect() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (!avx2) return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : Isa::avx2;
}

bool cpuid_leaf7(int subleaf, int reg, int bit) {
  unsigned regs[4] = {0, 0, 0, 0};
  __asm__ volatile("cpuid" : "=a"(regs[0]), "=b"(regs[1]), "=c"(regs[2]), "=d"(regs[3]) : "a"(7), "c"(subleaf));
  return (regs[reg] >> bit) & 1u;
}

bool tiles_permitted() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
Isa detect() { return Isa::portable; }
#endif

Isa parse(const std::string& name) {
  for (const Isa level : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name != isa_name(level)) continue;
    if (level > best_isa())
      throw std::invalid_argument("this machine has no " + name + "; its best is " + isa_name(best_isa()));
    return level;
  }
  throw std::invalid_argument("instruction set '" + name + "' is none of portable, avx2, avx512");
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa() {
  const int level = current.load(std::memory_order_relaxed);
  if (level != kUnset) return static_cast<Isa>(level);
  const char* asked = std::getenv("GEAR_CPU_ISA");
  const Isa chosen = asked != nullptr && *asked != '\0' ? parse(asked) : best_isa();
  current.store(static_cast<int>(chosen), std::memory_order_relaxed);
  return chosen;
}

void set_isa(const char* name) { current.store(static_cast<int>(parse(name)), std::memory_order_relaxed); }

void allow_extension(const char* name, bool allowed) {
  for (unsigned i = 0; i < 3; ++i) {
    if (std::string(name) != kExtensions[i]) continue;
    if (allowed) {
      forbidden.fetch_and(~(1u << i));
    } else {
      forbidden.fetch_or(1u << i);
    }
    return;
  }
  throw std::invalid_argument("extension '" + std::string(name) + "' is none of vnni, bf16, amx");
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

#ifdef GEAR_X86
// Asked once: cpuid costs microseconds under a hypervisor.
bool has_avx512_vnni() {
  static const bool found = cpuid_leaf7(0, 2, 11);
  return usable(kVnni) && found;
}
bool has_avx512_bf16() {
  static const bool found = cpuid_leaf7(1, 0, 5);
  return usable(kBf16) && found;
}
bool has_amx_bf16() {
  static const bool found = cpuid_leaf7(0, 3, 22) && cpuid_leaf7(0, 3, 24) && tiles_permitted();
  return usable(kAmx) && found;
}
bool has_amx_int8() {
  static const bool found = cpuid_leaf7(0, 3, 25) && cpuid_leaf7(0, 3, 24) && tiles_permitted();
  return usable(kAmx) && found;
}
#else
bool has_avx512_vnni() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx_bf16() { return false; }
bool has_amx_int8() { return false; }
#endif

}  // namespace gear
