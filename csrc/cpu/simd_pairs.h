// What products of pairs have in common on all instruction sets: a simd_<isa>.h of pairs adds the product itself, and the
// ways to make pairs of floats.
#pragma once

#include "simd.h"

namespace attn_ops::cpu {
namespace {

struct PairProduct {
  using S = Simd<float>;
  using V = Vec<float>;  // its bits
  typedef uint32_t Words __attribute__((vector_size(sizeof(Vec<float>))));
  typedef int16_t Halves __attribute__((vector_size(sizeof(Vec<float>))));
  static constexpr int numbers = 2;

  static ATTN_INLINE V load(const Pair* p) { return S::load(reinterpret_cast<const float*>(p)); }
  static ATTN_INLINE void store(Pair* p, V x) { S::store(reinterpret_cast<float*>(p), x); }
  static ATTN_INLINE V set1(const Pair* p) {
    uint32_t bits;
    memcpy(&bits, p, sizeof bits);
    return (V)(Words{} + bits);
  }
  static ATTN_INLINE V number(V x, int i) { return (V)(i == 0 ? (Words)x << 16 : (Words)x & 0xffff0000u); }
  static ATTN_INLINE V hidden(V weight, V x) {
    return (V)((Halves)x & (((Halves)weight & int16_t{0x7fff}) != 0));
  }
};

}  // namespace
}  // namespace attn_ops::cpu
