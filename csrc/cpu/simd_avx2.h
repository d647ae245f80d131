// AVX2 + FMA + F16C: 32-byte vectors, 16 registers.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace attn_ops::cpu {
namespace {

constexpr int kVectorRegisters = 16;

template <>
struct Simd<float> : SimdBase<float, int32_t, 32> {
  using SimdBase::load;
  using SimdBase::load_int8;
  static ATTN_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
  static ATTN_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
  static ATTN_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static ATTN_INLINE V set1(float x) { return _mm256_set1_ps(x); }
  static ATTN_INLINE bool any(I mask) { return _mm256_movemask_ps((__m256)mask) != 0; }

  // Products of the even (low) 32-bit halves.
  static ATTN_INLINE Longs multiply_even(Longs a, uint32_t m) {
    return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
  }
  static ATTN_INLINE Longs low_halves(Longs even, Longs odd) {
    return (Longs)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
  }

  static ATTN_INLINE V load(const float* p, int64_t n) {
    const I index = {0, 1, 2, 3, 4, 5, 6, 7};
    return _mm256_maskload_ps(p, (__m256i)(index < static_cast<int32_t>(n)));
  }
  // In registers: what the stack got in pieces cannot be forwarded to a load of the whole.
  static ATTN_INLINE void load_halves(const uint16_t* p, int64_t n, uint16_t* first) {
    uint64_t low = 0, high = 0;
    if (n >= 4) {
      memcpy(&low, p, 8);
      if (n > 4) {
        memcpy(&high, p + n - 4, 8);
        high >>= 16 * (8 - n);
      }
    } else if (n >= 2) {
      uint32_t two;
      memcpy(&two, p, 4);
      low = two | (n == 3 ? uint64_t{p[2]} << 32 : 0);
    } else if (n == 1) {
      low = p[0];
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(first),
                     _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low)));
  }

  static ATTN_INLINE V load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static ATTN_INLINE void store_half(uint16_t* p, V x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static ATTN_INLINE V load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  static ATTN_INLINE void transpose(V* r) {
    V t[8], s[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
    }
  }

  // A transposition whose halves are joined as soon as they meet: 14 shuffles instead of 24.
  template <class Join>
  static ATTN_INLINE V reduced(V* r, const Join& join) {
    for (int i = 0; i < 4; ++i)
      r[i] = join(_mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
      r[i] = join(_mm256_shuffle_ps(r[2 * i], r[2 * i + 1], 0x44), _mm256_shuffle_ps(r[2 * i], r[2 * i + 1], 0xee));
    return join(_mm256_permute2f128_ps(r[0], r[1], 0x20), _mm256_permute2f128_ps(r[0], r[1], 0x31));
  }
};

template <>
struct Simd<double> : SimdBase<double, int64_t, 32> {
  using SimdBase::load;
  static ATTN_INLINE V load(const double* p, int64_t n) {
    const I index = {0, 1, 2, 3};
    return _mm256_maskload_pd(p, (__m256i)(index < n));
  }
  static ATTN_INLINE V max(V a, V b) { return _mm256_max_pd(a, b); }
  static ATTN_INLINE V min(V a, V b) { return _mm256_min_pd(a, b); }
  static ATTN_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static ATTN_INLINE V set1(double x) { return _mm256_set1_pd(x); }
  static ATTN_INLINE bool any(I mask) { return _mm256_movemask_pd((__m256d)mask) != 0; }

  static ATTN_INLINE void transpose(V* r) {
    const V a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    const V c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }

  template <class Join>
  static ATTN_INLINE V reduced(V* r, const Join& join) {
    for (int i = 0; i < 2; ++i)
      r[i] = join(_mm256_unpacklo_pd(r[2 * i], r[2 * i + 1]), _mm256_unpackhi_pd(r[2 * i], r[2 * i + 1]));
    return join(_mm256_permute2f128_pd(r[0], r[1], 0x20), _mm256_permute2f128_pd(r[0], r[1], 0x31));
  }
};

}  // namespace
}  // namespace attn_ops::cpu
