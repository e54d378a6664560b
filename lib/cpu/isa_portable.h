// 16 float lanes in plain C++: what any machine runs, and the slow reference of the other paths.
#pragma once

#include "lib/cpu/isa_common.h"

namespace MOEBIUS_ISA {

struct Portable : PairRows {
  struct F {
    float v[16];
  };
  static constexpr int kRows = 2;
  static constexpr int tiles_beside(int64_t) { return 2; }
  static constexpr int kRowsOut = 1;

  template <class Op>
  MOEBIUS_INLINE static F each(Op op) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = op(i);
    return r;
  }
  MOEBIUS_INLINE static F zero() { return set1(0); }
  MOEBIUS_INLINE static F set1(float x) { return each([&](int) { return x; }); }
  MOEBIUS_INLINE static F load(const float* p) { return each([&](int i) { return p[i]; }); }
  MOEBIUS_INLINE static F load_n(const float* p, int n, float rest) { return each([&](int i) { return i < n ? p[i] : rest; }); }
  MOEBIUS_INLINE static void store(float* p, F a) { store_n(p, a, 16); }
  MOEBIUS_INLINE static void store_n(float* p, F a, int n) {
    for (int i = 0; i < n; ++i) p[i] = a.v[i];
  }
  MOEBIUS_INLINE static F add(F a, F b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  MOEBIUS_INLINE static F sub(F a, F b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  MOEBIUS_INLINE static F mul(F a, F b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  MOEBIUS_INLINE static F div(F a, F b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  MOEBIUS_INLINE static F fma(F a, F b, F c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }  // rounds twice
  MOEBIUS_INLINE static F max(F a, F b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  MOEBIUS_INLINE static F min(F a, F b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  MOEBIUS_INLINE static F round(F a) { return each([&](int i) { return __builtin_rintf(a.v[i]); }); }
  MOEBIUS_INLINE static F scale_by_power(F a, F n) {
    return each([&](int i) {
      const int whole = static_cast<int>(n.v[i]), half = whole >> 1;
      const float p = __builtin_bit_cast(float, (half + 127) << 23), q = __builtin_bit_cast(float, (whole - half + 127) << 23);
      return a.v[i] * p * q;
    });
  }
  MOEBIUS_INLINE static F select_first(int n, F a, F b) { return each([&](int i) { return i < n ? a.v[i] : b.v[i]; }); }

  MOEBIUS_INLINE static F load_half(const f16* p) { return each([&](int i) { return half_to_float(p[i]); }); }
  MOEBIUS_INLINE static void store_half(f16* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = to_half(a.v[i]);
  }
  MOEBIUS_INLINE static void store_bf16(bf16* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = to_bf16(a.v[i]);
  }
  MOEBIUS_INLINE static float sum(F a) {
    for (int n = 8; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
    return a.v[0];
  }
  MOEBIUS_INLINE static float max_of(F a) {
    for (int n = 8; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
    return a.v[0];
  }
  MOEBIUS_INLINE static uint32_t equal(F a, F b) {
    uint32_t m = 0;
    for (int i = 0; i < 16; ++i) m |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
    return m;
  }
  // dst[i] += nearest integer of v[i], |v[i]| < kFixedLimit; nothing for others.
  static constexpr float kFixedLimit = 0x1p62f;
  MOEBIUS_INLINE static void add_fixed(int64_t* dst, F a) {
    for (int i = 0; i < 16; ++i)
      if (__builtin_fabsf(a.v[i]) < kFixedLimit)
        dst[i] = static_cast<int64_t>(static_cast<uint64_t>(dst[i]) + static_cast<uint64_t>(static_cast<int64_t>(__builtin_rintf(a.v[i]))));
  }
  // Gathers the largest magnitude: as bits without the sign, where infinity and NaN are the largest.
  struct Seen {
    uint32_t most;
  };
  MOEBIUS_INLINE static Seen nothing_seen() { return {0}; }
  MOEBIUS_INLINE static void see(Seen& seen, F a) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, a.v[i]) & 0x7fffffffu;
      seen.most = bits > seen.most ? bits : seen.most;
    }
  }
  MOEBIUS_INLINE static bool all_below(Seen seen, float limit) { return seen.most < __builtin_bit_cast(uint32_t, limit); }

  struct W {
    F even, odd;
  };
  struct A {
    float even, odd;
  };
  MOEBIUS_INLINE static W load_w(const bf16* p) {
    return {each([&](int i) { return to_float(p[2 * i]); }), each([&](int i) { return to_float(p[2 * i + 1]); })};
  }
  MOEBIUS_INLINE static A load_a(const Laid* p) {
    return {to_float(static_cast<bf16>(*p & 0xffff)), to_float(static_cast<bf16>(*p >> 16))};
  }
  MOEBIUS_INLINE static F dot(const F& acc, const W& w, const A& a) {
    return each([&](int i) { return (acc.v[i] + w.even.v[i] * a.even) + w.odd.v[i] * a.odd; });
  }
  MOEBIUS_INLINE static void widen(const bf16* p, F& even, F& odd) {
    const W w = load_w(p);
    even = w.even;
    odd = w.odd;
  }
};

}  // namespace MOEBIUS_ISA
