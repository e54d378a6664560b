// Small integer arithmetic used everywhere: rounding, shares of a range, checked products of untrusted sizes.
#pragma once

#include <cstdint>

// Inlined always, so that no copy of it compiled for one instruction set can be linked into code for another: kernels are
// compiled several times with different flags (lib/cpu/kernels.h).
#define MOEBIUS_INLINE [[gnu::always_inline]] inline

namespace moebius {

MOEBIUS_INLINE constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOEBIUS_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// False when a · b does not fit; untrusted sizes are multiplied only through this.
inline bool checked_mul(uint64_t a, uint64_t b, uint64_t* out) { return !__builtin_mul_overflow(a, b, out); }

struct Range {
  int64_t begin = 0, end = 0;
  MOEBIUS_INLINE constexpr int64_t size() const { return end - begin; }
  MOEBIUS_INLINE constexpr bool empty() const { return end <= begin; }
  MOEBIUS_INLINE constexpr bool contains(int64_t i) const { return begin <= i && i < end; }
};

// The part-th of `parts` nearly equal consecutive shares of [0, n), in units of `unit` (the last share takes the rest).
MOEBIUS_INLINE constexpr Range share_of(int64_t n, int64_t part, int64_t parts, int64_t unit = 1) {
  const int64_t units = div_up(n, unit);
  const int64_t begin = units * part / parts * unit, end = units * (part + 1) / parts * unit;
  return {begin < n ? begin : n, end < n ? end : n};
}

}  // namespace moebius
