// Element types of checkpoints and their conversion to and from float. bf16 rounding is to nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

#include "lib/base/numbers.h"

namespace moebius {

using bf16 = uint16_t;  // bits of a bfloat16: the upper half of a float

MOEBIUS_INLINE float to_float(bf16 v) { return __builtin_bit_cast(float, static_cast<uint32_t>(v) << 16); }

MOEBIUS_INLINE bf16 to_bf16(float v) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((u >> 16) | 0x40);  // NaN stays NaN
  return static_cast<bf16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float f = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -f : f;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

}  // namespace moebius
