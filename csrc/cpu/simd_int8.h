// Products of int8 numbers widened to 16 bits.
#pragma once

#include "cpu/simd.h"

namespace gear::GEAR_ISA {

#if defined(GEAR_ISA_avx512) || defined(GEAR_ISA_avx2)
// total += products of 16-bit numbers, added in pairs. Spelt out: left to itself GCC 12 makes all products before it
// adds the first, and keeps sums in memory for want of registers. The copy keeps `total`, which may be an array's
// element, out of memory.
inline void add_products(__m256i w, __m256i x, __m256i& total) {
  __m256i products, sum = total;
  __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(w), "x"(x));
  total = sum;
}
#endif

}  // namespace gear::GEAR_ISA
