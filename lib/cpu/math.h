// exp and what is made of it: own functions, because a C library's differ between machines and between body and tail.
#pragma once

#include "lib/cpu/tiles.h"

namespace MOEBIUS_ISA {

constexpr float kInfinity = __builtin_inff();

// e^x, relative error below 2e-7 for −87 ≤ x ≤ 88; 0 below −104, infinity above 89; NaN stays NaN.
// Cody–Waite reduction by ln 2 in two parts, then a Taylor polynomial of degree 6 on |r| ≤ 0.347 (next term r^7/5040 < 1.2e-7).
MOEBIUS_INLINE F exp_of(F x) {
  x = Vec::min(Vec::set1(89.0f), Vec::max(Vec::set1(-104.0f), x));  // the second operand wins where one is NaN
  const F n = Vec::round(Vec::mul(x, Vec::set1(1.44269504f)));
  F r = Vec::fma(n, Vec::set1(-0.693145752f), x);
  r = Vec::fma(n, Vec::set1(-1.42860677e-6f), r);
  F p = Vec::set1(1.0f / 720);
  p = Vec::fma(p, r, Vec::set1(1.0f / 120));
  p = Vec::fma(p, r, Vec::set1(1.0f / 24));
  p = Vec::fma(p, r, Vec::set1(1.0f / 6));
  p = Vec::fma(p, r, Vec::set1(0.5f));
  p = Vec::fma(p, r, Vec::set1(1.0f));
  p = Vec::fma(p, r, Vec::set1(1.0f));
  return Vec::scale_by_power(p, n);
}

// 1 / (1 + e⁻ˣ)
MOEBIUS_INLINE F sigmoid(F x) { return Vec::div(Vec::set1(1.0f), Vec::add(Vec::set1(1.0f), exp_of(Vec::sub(Vec::zero(), x)))); }

MOEBIUS_INLINE float exp_of(float x) {
  float out[16];
  Vec::store(out, exp_of(Vec::set1(x)));
  return out[0];
}

// x · sigmoid(x)
MOEBIUS_INLINE F silu(F x) {
  const F minus = Vec::sub(Vec::zero(), x);
  return Vec::div(x, Vec::add(Vec::set1(1.0f), exp_of(minus)));
}

// Σ x² of n floats: lane i mod 16, then the fixed tree.
MOEBIUS_INLINE float sum_of_squares(const float* x, int64_t n) {
  F acc = Vec::zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F v = Vec::load(x + i);
    acc = Vec::fma(v, v, acc);
  }
  if (i < n) {
    const F v = Vec::load_n(x + i, static_cast<int>(n - i), 0);
    acc = Vec::fma(v, v, acc);
  }
  return Vec::sum(acc);
}

}  // namespace MOEBIUS_ISA
