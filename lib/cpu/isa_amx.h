// AVX-512 for single values, AMX for products. Included by one translation unit.
#pragma once

#include "lib/cpu/isa_avx512.h"
#include "lib/cpu/matrix.h"

namespace MOEBIUS_ISA {

// (A host may use the registers for something else between two ops.)
struct Amx {
  MOEBIUS_INLINE Amx() {
    static constexpr struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } kShapes;
    asm volatile("ldtilecfg %0" : : "m"(kShapes));
  }
  MOEBIUS_INLINE ~Amx() { asm volatile("tilerelease"); }
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;

  template <int T>
  MOEBIUS_INLINE static void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
  template <int T>
  MOEBIUS_INLINE static void load(const void* at, int64_t step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(step), "i"(T) : "memory");
  }
  template <int T>
  MOEBIUS_INLINE static void store(void* at, int64_t step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(step), "i"(T) : "memory");
  }
  template <int Sums, int Rows, int Weights>
  MOEBIUS_INLINE static void dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Rows), "i"(Weights)); }
};

}  // namespace MOEBIUS_ISA
