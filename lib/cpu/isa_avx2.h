// 16 float lanes in two AVX2 registers.
#pragma once

#include <immintrin.h>

#include "lib/cpu/isa_common.h"

namespace MOEBIUS_ISA {

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  static constexpr int kRows = 5;  // rows × 2 registers of a tile + 4 of its widened weights + 1 of a row = 15 of 16
  static constexpr int tiles_beside(int64_t rows) { return rows <= 2 ? 2 : 1; }
  static constexpr bool kFewRegisters = true, kMatrix = false;
  struct Unit {};
  static constexpr int kRowsOut = 6;  // attention's P·V: rows × 2 accumulators + 2 of values + a weight

  MOEBIUS_INLINE static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  MOEBIUS_INLINE static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  MOEBIUS_INLINE static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  // All bits of the first n lanes.
  struct M {
    __m256i a, b;
  };
  MOEBIUS_INLINE static M first(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane)};
  }
  MOEBIUS_INLINE static F load_n(const float* p, int n, float rest) {
    const M m = first(n);
    return {_mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(p, m.a), _mm256_castsi256_ps(m.a)),
            _mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(p + 8, m.b), _mm256_castsi256_ps(m.b))};
  }
  MOEBIUS_INLINE static void store(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  MOEBIUS_INLINE static void store_n(float* p, F v, int n) {
    const M m = first(n);
    _mm256_maskstore_ps(p, m.a, v.a);
    _mm256_maskstore_ps(p + 8, m.b, v.b);
  }
  MOEBIUS_INLINE static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  MOEBIUS_INLINE static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  MOEBIUS_INLINE static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  MOEBIUS_INLINE static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  MOEBIUS_INLINE static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  MOEBIUS_INLINE static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  MOEBIUS_INLINE static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  MOEBIUS_INLINE static F round(F x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  // In two steps, so that 2^n itself may leave the range of a float.
  MOEBIUS_INLINE static __m256 scale_half(__m256 x, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256 p = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 q = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(x, p), q);
  }
  MOEBIUS_INLINE static F scale_by_power(F x, F n) { return {scale_half(x.a, n.a), scale_half(x.b, n.b)}; }
  MOEBIUS_INLINE static F select_first(int n, F x, F y) {
    const M m = first(n);
    return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(m.a)), _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(m.b))};
  }

  // 16 halves as floats; 16 floats rounded to halves, ties to even.
  MOEBIUS_INLINE static F load_half(const f16* p) {
    const __m128i* at = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
  }
  MOEBIUS_INLINE static void store_half(f16* p, F v) {
    __m128i* at = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(at, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(at + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // 16 floats rounded to bf16, ties to even, NaN kept.
  MOEBIUS_INLINE static void store_bf16(bf16* p, F v) {
    const auto rounded = [](__m256 x) MOEBIUS_INLINE_LAMBDA {
      const __m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
      const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
      const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
      return _mm256_blendv_epi8(r, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
    };
    const __m256i packed = _mm256_packus_epi32(rounded(v.a), rounded(v.b));  // quarters of a and b in turn
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }

  MOEBIUS_INLINE static float sum(F v) {
    const __m256 h = _mm256_add_ps(v.a, v.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  MOEBIUS_INLINE static float max_of(F v) {
    const __m256 h = _mm256_max_ps(v.a, v.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }
  MOEBIUS_INLINE static uint32_t equal(F x, F y) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ))) |
           static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ))) << 8;
  }
  // dst[i] += nearest integer of v[i], |v[i]| < kFixedLimit; anything for others. There is no conversion to 64 bits: adding
  // 1.5·2^52 leaves the integer in a double's low bits, to nearest even.
  static constexpr float kFixedLimit = 0x1p51f;
  MOEBIUS_INLINE static void add_fixed(int64_t* dst, F v) {
    const __m256d magic = _mm256_set1_pd(0x1.8p52);
    const auto add = [&](int64_t* to, __m128 x) MOEBIUS_INLINE_LAMBDA {
      const __m256i i = _mm256_sub_epi64(_mm256_castpd_si256(_mm256_add_pd(_mm256_cvtps_pd(x), magic)), _mm256_castpd_si256(magic));
      __m256i* at = reinterpret_cast<__m256i*>(to);
      _mm256_store_si256(at, _mm256_add_epi64(_mm256_load_si256(at), i));
    };
    add(dst, _mm256_castps256_ps128(v.a));
    add(dst + 4, _mm256_extractf128_ps(v.a, 1));
    add(dst + 8, _mm256_castps256_ps128(v.b));
    add(dst + 12, _mm256_extractf128_ps(v.b, 1));
  }
  // Gathers the largest magnitude: as bits without the sign, where infinity and NaN are the largest.
  struct Seen {
    __m256i most;
  };
  MOEBIUS_INLINE static Seen nothing_seen() { return {_mm256_setzero_si256()}; }
  MOEBIUS_INLINE static void see(Seen& seen, F v) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    seen.most = _mm256_max_epu32(seen.most, _mm256_max_epu32(_mm256_and_si256(_mm256_castps_si256(v.a), mask),
                                                             _mm256_and_si256(_mm256_castps_si256(v.b), mask)));
  }
  MOEBIUS_INLINE static bool all_below(Seen seen, float limit) {
    const __m256i bits = _mm256_set1_epi32(static_cast<int>(__builtin_bit_cast(uint32_t, limit)));
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(bits, seen.most)) == -1;
  }

  struct W {
    F even, odd;
  };
  // A row's pair is widened once, when the row is laid out, and then only spread.
  struct Laid {
    float even, odd;
  };
  struct A {
    __m256 even, odd;
  };
  MOEBIUS_INLINE static __m256 even_of(__m256i p) { return _mm256_castsi256_ps(_mm256_slli_epi32(p, 16)); }
  MOEBIUS_INLINE static __m256 odd_of(__m256i p) {
    return _mm256_castsi256_ps(_mm256_and_si256(p, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  MOEBIUS_INLINE static W load_w(const bf16* p) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
    return {{even_of(a), even_of(b)}, {odd_of(a), odd_of(b)}};
  }
  MOEBIUS_INLINE static A load_a(const Laid* p) { return {_mm256_broadcast_ss(&p->even), _mm256_broadcast_ss(&p->odd)}; }
  // dst[p·n + r] = pair p of row r; row(r) → pointer to its pairs.
  template <class RowOf>
  MOEBIUS_INLINE static void interleave(Laid* dst, int64_t n, int64_t pairs, const RowOf& row) {
    for (int64_t r = 0; r < n; ++r) {
      const Pair* from = row(r);
      Laid* to = dst + r;
      const auto store = [&](__m128 x, __m128 next) MOEBIUS_INLINE_LAMBDA {  // two pairs each
        for (const __m128 two : {x, next}) {
          _mm_storel_pi(reinterpret_cast<__m64*>(to), two);
          _mm_storeh_pi(reinterpret_cast<__m64*>(to + n), two);
          to += 2 * n;
        }
      };
      int64_t p = 0;
      for (; p + 8 <= pairs; p += 8) {
        const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + p));
        const __m256 a = _mm256_unpacklo_ps(even_of(eight), odd_of(eight));  // pairs 0, 1, 4, 5
        const __m256 b = _mm256_unpackhi_ps(even_of(eight), odd_of(eight));  // pairs 2, 3, 6, 7
        store(_mm256_castps256_ps128(a), _mm256_castps256_ps128(b));
        store(_mm256_extractf128_ps(a, 1), _mm256_extractf128_ps(b, 1));
      }
      for (; p < pairs; ++p, to += n) *to = {__builtin_bit_cast(float, from[p] << 16), __builtin_bit_cast(float, from[p] & 0xffff0000u)};
    }
  }
  MOEBIUS_INLINE static F dot(F acc, const W& w, const A& a) {
    return {_mm256_fmadd_ps(w.odd.a, a.odd, _mm256_fmadd_ps(w.even.a, a.even, acc.a)),
            _mm256_fmadd_ps(w.odd.b, a.odd, _mm256_fmadd_ps(w.even.b, a.even, acc.b))};
  }
  MOEBIUS_INLINE static void widen(const bf16* p, F& even, F& odd) {
    const W w = load_w(p);
    even = w.even;
    odd = w.odd;
  }
};

}  // namespace MOEBIUS_ISA
