// AVX-512 (F, BW, VL, DQ): 64-byte vectors, 32 registers.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace attn_ops::cpu {
namespace {

constexpr int kVectorRegisters = 32;
constexpr int kNotFinite = 0x99;  // of vfpclass: quiet NaN, inf, -inf, signalling NaN

template <>
struct Simd<float> : SimdBase<float, int32_t, 64> {
  using SimdBase::load;
  static ATTN_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
  static ATTN_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
  static ATTN_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static ATTN_INLINE V set1(float x) { return _mm512_set1_ps(x); }
  static ATTN_INLINE bool any(I mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
  static ATTN_INLINE bool finite(V x) { return _mm512_fpclass_ps_mask(x, kNotFinite) == 0; }

  // x - floor(x), 0 of infinities; and y 2^floor(x), or 0 where that is no normal number (it would take 80 ns). NaN stays NaN.
  static ATTN_INLINE V above_floor(V x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static ATTN_INLINE V times_power(V y, V x) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126), _CMP_NLT_UQ), y, x);
  }

  // Products of the even (low) 32-bit halves.
  static ATTN_INLINE Longs multiply_even(Longs a, uint32_t m) {
    return (Longs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
  }
  static ATTN_INLINE Longs low_halves(Longs even, Longs odd) {
    return (Longs)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
  }

  static ATTN_INLINE V load(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  }
  static ATTN_INLINE void load_halves(const uint16_t* p, int64_t n, uint16_t* first) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(first),
                        _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
  }

  static ATTN_INLINE V load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static ATTN_INLINE void store_half(uint16_t* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static ATTN_INLINE V load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static ATTN_INLINE V load_int8(const int8_t* p, int64_t n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p)));
  }

  // 4x4 blocks inside each 128-bit lane, then the lanes themselves as a 4x4 matrix.
  static ATTN_INLINE void transpose(V* r) {
    V t[16], s[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      s[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      s[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      s[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      s[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      const V a = _mm512_shuffle_f32x4(s[i], s[i + 4], 0x44), b = _mm512_shuffle_f32x4(s[i], s[i + 4], 0xee);
      const V c = _mm512_shuffle_f32x4(s[i + 8], s[i + 12], 0x44), d = _mm512_shuffle_f32x4(s[i + 8], s[i + 12], 0xee);
      r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      r[i + 4] = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[i + 8] = _mm512_shuffle_f32x4(b, d, 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }

  // A transposition whose halves are joined as soon as they meet: 30 shuffles instead of 64.
  template <class Join>
  static ATTN_INLINE V reduced(V* r, const Join& join) {
    for (int i = 0; i < 8; ++i)
      r[i] = join(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    for (int i = 0; i < 4; ++i)
      r[i] = join(_mm512_shuffle_ps(r[2 * i], r[2 * i + 1], 0x44), _mm512_shuffle_ps(r[2 * i], r[2 * i + 1], 0xee));
    for (int i = 0; i < 2; ++i)
      r[i] = join(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x44), _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xee));
    return join(_mm512_shuffle_f32x4(r[0], r[1], 0x88), _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
  }
};

template <>
struct Simd<double> : SimdBase<double, int64_t, 64> {
  using SimdBase::load;
  static ATTN_INLINE V load(const double* p, int64_t n) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
  }
  static ATTN_INLINE V max(V a, V b) { return _mm512_max_pd(a, b); }
  static ATTN_INLINE V min(V a, V b) { return _mm512_min_pd(a, b); }
  static ATTN_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static ATTN_INLINE V set1(double x) { return _mm512_set1_pd(x); }
  static ATTN_INLINE bool any(I mask) { return _mm512_movepi64_mask((__m512i)mask) != 0; }
  static ATTN_INLINE bool finite(V x) { return _mm512_fpclass_pd_mask(x, kNotFinite) == 0; }

  static ATTN_INLINE void transpose(V* r) {
    V t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {  // 128-bit lanes of rows i, i+2, i+4, i+6 as a 4x4 matrix
      const V a = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x44), b = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xee);
      const V c = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x44), d = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xee);
      r[i] = _mm512_shuffle_f64x2(a, c, 0x88);
      r[i + 2] = _mm512_shuffle_f64x2(a, c, 0xdd);
      r[i + 4] = _mm512_shuffle_f64x2(b, d, 0x88);
      r[i + 6] = _mm512_shuffle_f64x2(b, d, 0xdd);
    }
  }

  template <class Join>
  static ATTN_INLINE V reduced(V* r, const Join& join) {
    for (int i = 0; i < 4; ++i)
      r[i] = join(_mm512_unpacklo_pd(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_pd(r[2 * i], r[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
      r[i] = join(_mm512_shuffle_f64x2(r[2 * i], r[2 * i + 1], 0x44), _mm512_shuffle_f64x2(r[2 * i], r[2 * i + 1], 0xee));
    return join(_mm512_shuffle_f64x2(r[0], r[1], 0x88), _mm512_shuffle_f64x2(r[0], r[1], 0xdd));
  }
};

}  // namespace
}  // namespace attn_ops::cpu
