// NEON with BF16 (Armv8.6, or an option of Armv8.2): what kernels for pairs of bfloat16 need; all else is NEON's.
//
// bfdot takes no notice of the floating-point mode either; it rounds to odd, and a subnormal number is 0 to it.
#pragma once

#include "simd_neon.h"
#include "simd_pairs.h"

#define ATTN_OPS_OF_PAIRS_BESIDE neon

namespace attn_ops::cpu {
namespace {

template <>
struct Product<Pair> : PairProduct {
  static ATTN_INLINE V add(V x, V y, V sum) { return vbfdotq_f32(sum, (bfloat16x8_t)x, (bfloat16x8_t)y); }

  // Each lane of `first` and of `second` beside one another, to nearest even.
  static ATTN_INLINE V pairs(V first, V second) {
    const uint16x4x2_t beside = vzip_u16(rounded(first), rounded(second));
    return (V)vcombine_u16(beside.val[0], beside.val[1]);
  }
  // The lanes of each as pairs of neighbours.
  static ATTN_INLINE void store_neighbours(Pair* to_first, Pair* to_second, V first, V second) {
    vst1_u16(reinterpret_cast<uint16_t*>(to_first), rounded(first));
    vst1_u16(reinterpret_cast<uint16_t*>(to_second), rounded(second));
  }

 private:
  static ATTN_INLINE uint16x4_t rounded(V x) { return vreinterpret_u16_bf16(vcvt_bf16_f32(x)); }
};

}  // namespace
}  // namespace attn_ops::cpu
