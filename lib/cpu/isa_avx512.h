// 16 float lanes in one AVX-512 register, with or without the bf16 dot product. Included by one translation unit per path.
#pragma once

#include <immintrin.h>

#include "lib/cpu/isa_common.h"

namespace MOEBIUS_ISA {

struct Avx512 : PairRows {
  using F = __m512;
  using M = __mmask16;
  static constexpr int kRows = 12;  // rows × 2 tiles of accumulators + 2 weights = 26 of 32 registers
  static constexpr int tiles_beside(int64_t rows) { return rows <= 5 ? 4 : 2; }  // 5 rows × 4 tiles + 4 weights = 24
  static constexpr int kRowsOut = 6;  // attention's P·V: rows × 4 accumulators + 4 values

  MOEBIUS_INLINE static F zero() { return _mm512_setzero_ps(); }
  MOEBIUS_INLINE static F set1(float x) { return _mm512_set1_ps(x); }
  MOEBIUS_INLINE static F load(const float* p) { return _mm512_loadu_ps(p); }
  MOEBIUS_INLINE static F load_n(const float* p, int n, float rest) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(rest), first(n), p);
  }
  MOEBIUS_INLINE static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  MOEBIUS_INLINE static void store_n(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  MOEBIUS_INLINE static F add(F a, F b) { return _mm512_add_ps(a, b); }
  MOEBIUS_INLINE static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  MOEBIUS_INLINE static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  MOEBIUS_INLINE static F div(F a, F b) { return _mm512_div_ps(a, b); }
  MOEBIUS_INLINE static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  MOEBIUS_INLINE static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  MOEBIUS_INLINE static F min(F a, F b) { return _mm512_min_ps(a, b); }
  MOEBIUS_INLINE static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // a · 2^n for integral n.
  MOEBIUS_INLINE static F scale_by_power(F a, F n) { return _mm512_scalef_ps(a, n); }
  MOEBIUS_INLINE static M first(int n) { return static_cast<M>((1u << n) - 1); }
  MOEBIUS_INLINE static F select_first(int n, F a, F b) { return _mm512_mask_blend_ps(first(n), b, a); }

  // 16 halves as floats; 16 floats rounded to halves, ties to even.
  MOEBIUS_INLINE static F load_half(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  MOEBIUS_INLINE static void store_half(f16* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // 16 floats rounded to bf16, ties to even, NaN kept.
  MOEBIUS_INLINE static void store_bf16(bf16* p, F v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
    const M nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }

  // Fixed trees: the halves, then quarters, …
  MOEBIUS_INLINE static float sum(F v) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  MOEBIUS_INLINE static float max_of(F v) {
    const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }
  MOEBIUS_INLINE static uint32_t equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

  // dst[i] += nearest integer of v[i], |v[i]| < kFixedLimit; anything for others.
  static constexpr float kFixedLimit = 0x1p62f;
  MOEBIUS_INLINE static void add_fixed(int64_t* dst, F v) {
    const __m512i lo = _mm512_cvtps_epi64(_mm512_castps512_ps256(v)), hi = _mm512_cvtps_epi64(_mm512_extractf32x8_ps(v, 1));
    _mm512_store_si512(dst, _mm512_add_epi64(_mm512_load_si512(dst), lo));
    _mm512_store_si512(dst + 8, _mm512_add_epi64(_mm512_load_si512(dst + 8), hi));
  }
  // Gathers the largest magnitude: as bits without the sign, where infinity and NaN are the largest.
  using Seen = __m512i;
  MOEBIUS_INLINE static Seen nothing_seen() { return _mm512_setzero_si512(); }
  MOEBIUS_INLINE static void see(Seen& seen, F v) {
    const __m512i bits = _mm512_castps_si512(v);
    seen = _mm512_max_epu32(seen, _mm512_add_epi32(bits, bits));
  }
  MOEBIUS_INLINE static bool all_below(Seen seen, float limit) {
    return _mm512_cmpge_epu32_mask(seen, _mm512_set1_epi32(static_cast<int>(__builtin_bit_cast(uint32_t, limit) << 1))) == 0;
  }

#ifdef __AVX512BF16__
  using W = __m512bh;  // 16 outputs × 2 of k
  using A = __m512bh;
  MOEBIUS_INLINE static W load_w(const bf16* p) { return reinterpret_cast<W>(_mm512_loadu_si512(p)); }
  MOEBIUS_INLINE static A load_a(const Laid* p) { return reinterpret_cast<A>(_mm512_set1_epi32(static_cast<int>(*p))); }
  MOEBIUS_INLINE static F dot(F acc, W w, A a) { return _mm512_dpbf16_ps(acc, w, a); }
#else
  struct W {
    F even, odd;
  };
  using A = W;
  MOEBIUS_INLINE static W split(__m512i pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  MOEBIUS_INLINE static W load_w(const bf16* p) { return split(_mm512_loadu_si512(p)); }
  MOEBIUS_INLINE static A load_a(const Laid* p) { return split(_mm512_set1_epi32(static_cast<int>(*p))); }
  MOEBIUS_INLINE static F dot(F acc, const W& w, const A& a) { return fma(w.odd, a.odd, fma(w.even, a.even, acc)); }
#endif
  // The two bf16 of 16 outputs as floats.
  MOEBIUS_INLINE static void widen(const bf16* p, F& even, F& odd) {
    const __m512i pairs = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

}  // namespace MOEBIUS_ISA
