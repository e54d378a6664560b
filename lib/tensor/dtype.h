// Element types of checkpoints and their conversion to and from float. bf16 rounding is to nearest, ties to even.
#pragma once

#include <cstdint>

#include "lib/base/numbers.h"

namespace moebius {

using bf16 = uint16_t;  // bits of a bfloat16: the upper half of a float

MOEBIUS_INLINE constexpr float to_float(bf16 v) { return __builtin_bit_cast(float, static_cast<uint32_t>(v) << 16); }

MOEBIUS_INLINE constexpr bf16 to_bf16(float v) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((u >> 16) | 0x40);  // NaN stays NaN
  return static_cast<bf16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

using f16 = uint16_t;  // bits of an IEEE half

MOEBIUS_INLINE constexpr float half_to_float(f16 h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float f = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -f : f;
  }
  return __builtin_bit_cast(float, sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// To nearest, ties to even; infinity from 65,520 on; NaN stays NaN.
MOEBIUS_INLINE constexpr f16 to_half(float v) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<f16>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<f16>(sign | 0x7c00u);
  if (a < 0x38800000u)  // below 2^−14 the steps are 2^−24, those of a float near 0.5
    return static_cast<f16>(sign | (__builtin_bit_cast(uint32_t, __builtin_bit_cast(float, a) + 0.5f) - 0x3f000000u));
  return static_cast<f16>(sign | ((a - (112u << 23) + 0xfffu + ((a >> 13) & 1)) >> 13));
}

}  // namespace moebius
