// AVX-512 with BF16: what kernels for pairs of bfloat16 need, and nothing else; all else is AVX-512's.
//
// vdpbf16ps takes no notice of the thread's floating-point mode: it rounds to nearest, and a subnormal number is 0 to it.
#pragma once

#include "simd_avx512.h"
#include "simd_pairs.h"

#define ATTN_OPS_OF_PAIRS_BESIDE avx512

namespace attn_ops::cpu {
namespace {

template <>
struct Product<Pair> : PairProduct {
  static ATTN_INLINE V add(V x, V y, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }

  // Each lane of `first` and of `second` beside one another, to nearest even.
  static ATTN_INLINE V pairs(V first, V second) {
    return (V)_mm512_permutexvar_epi16(beside(), in_turn(first, second));
  }
  // The lanes of each as pairs of neighbours.
  static ATTN_INLINE void store_neighbours(Pair* to_first, Pair* to_second, V first, V second) {
    const __m512i both = in_turn(first, second);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_first), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_second), _mm512_extracti64x4_epi64(both, 1));
  }

 private:
  static ATTN_INLINE __m512i in_turn(V first, V second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
  static ATTN_INLINE __m512i beside() {
    Halves order{};
    for (int i = 0; i < 16; ++i) order[2 * i] = static_cast<int16_t>(i), order[2 * i + 1] = static_cast<int16_t>(16 + i);
    return (__m512i)order;
  }
};

}  // namespace
}  // namespace attn_ops::cpu
