// The four ways to multiply (config.h): element types, and how the operands of a matrix product lie in a warp's
// registers.
//
// A product is cut into 16 x 8 results (`d` of mma_* in ptx.cuh) and steps along the summed dimension of 32 bytes: 16
// elements of 16 bits, 8 of float32. So shared memory is addressed alike, whatever the type.
#pragma once

#include "config.h"
#include "ptx.cuh"

namespace attn_ops::cuda {

constexpr float kLog2E = 1.4426950408889634f;

ATTN_DEVICE float minus_infinity() { return float_of(0xff800000u); }
ATTN_DEVICE bool is_minus_infinity(float x) { return bits_of(x) == 0xff800000u; }

// What the four lanes of a quad, which share a row, have of a sum becomes the sum; and of a maximum.
ATTN_DEVICE void sum_of_quad(float& x) {
  x += shuffle_xor(x, 1);
  x += shuffle_xor(x, 2);
}

ATTN_DEVICE void largest_of_quad(float& x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  x = fmaxf(x, shuffle_xor(x, 2));
}

// 16-bit elements: two to a register, as they come from memory.
//
// kPartsOfFloat elements have a sum that is a float32, but for its last bit or two.
struct Bits16 {
  using Element = uint16_t;
  static constexpr int kMmaK = 16;  // elements summed by one mma
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };
  ATTN_DEVICE static A a(const uint32_t (&r)[4]) { return {{r[0], r[1], r[2], r[3]}}; }
  ATTN_DEVICE static B b(uint32_t r0, uint32_t r1) { return {{r0, r1}}; }
};

struct F16 : Bits16 {
  static constexpr Math kMath = Math::kFloat16;
  static constexpr int kPartsOfFloat = 2;
  ATTN_DEVICE static void mma(float (&d)[4], const A& a, const B& b) { mma_f16(d, a.x, b.x); }
  ATTN_DEVICE static uint32_t pack(float low, float high) { return pack_f16(low, high); }
  ATTN_DEVICE static float to_float(uint16_t bits) { return from_f16(bits); }
  ATTN_DEVICE static uint16_t from_float(float x) { return static_cast<uint16_t>(pack_f16(x, 0.0f)); }
  ATTN_DEVICE static float low(uint32_t packed) { return from_f16(static_cast<uint16_t>(packed)); }
  ATTN_DEVICE static float high(uint32_t packed) { return from_f16(static_cast<uint16_t>(packed >> 16)); }
};

struct BF16 : Bits16 {
  static constexpr Math kMath = Math::kBFloat16;
  static constexpr int kPartsOfFloat = 3;
  ATTN_DEVICE static void mma(float (&d)[4], const A& a, const B& b) { mma_bf16(d, a.x, b.x); }
  ATTN_DEVICE static uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  ATTN_DEVICE static float to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
  ATTN_DEVICE static uint16_t from_float(float x) { return static_cast<uint16_t>(pack_bf16(x, 0.0f)); }
  ATTN_DEVICE static float low(uint32_t packed) { return float_of(packed << 16); }
  ATTN_DEVICE static float high(uint32_t packed) { return float_of(packed & 0xffff0000u); }
};

struct Bits32 {
  using Element = float;
  static constexpr int kMmaK = 8;
  static constexpr int kPartsOfFloat = 1;
  ATTN_DEVICE static float to_float(float x) { return x; }
  ATTN_DEVICE static float from_float(float x) { return x; }
};

constexpr uint32_t kInfinityBits = 0x7f800000u;
ATTN_DEVICE bool is_finite_bits(uint32_t x) { return (x & kInfinityBits) != kInfinityBits; }
ATTN_DEVICE bool is_finite(float x) { return is_finite_bits(bits_of(x)); }

// mma_tf32 reads the upper 19 bits of a number. Half of what it leaves out, added to the bits, makes that a rounding.
// (From kHalfOfTf32 below infinity on, that becomes infinity; some NaN become zero.)
constexpr uint32_t kHalfOfTf32 = 0x1000;

// Float32 as it lies, of which mma_tf32 cuts off what it does not read.
struct CutOff : Bits32 {
  static constexpr Math kMath = Math::kTf32;
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };
  ATTN_DEVICE static A a(const uint32_t (&r)[4]) { return {{r[0], r[1], r[2], r[3]}}; }
  ATTN_DEVICE static B b(uint32_t r0, uint32_t r1) { return {{r0, r1}}; }
  ATTN_DEVICE static void mma(float (&d)[4], const A& a, const B& b) { mma_tf32(d, a.x, b.x); }
};

// 3xTF32: x = big + small, each with 11 significant bits, and a b = big big + big small + small big, off by about
// 2^-22.
//
// Of an infinity, and of what becomes one, small is NaN or infinite the other way, and so is each product with it NaN.
// Of scores and of dp, restore_infinities makes what they should be; keys, values and gradients that are summed up have
// left their tiles before (finite.cuh).
struct F32 : Bits32 {
  static constexpr Math kMath = Math::kFloat32;
  struct A {
    uint32_t big[4], small[4];
  };
  struct B {
    uint32_t big[2], small[2];
  };
  ATTN_DEVICE static A a(const uint32_t (&r)[4]) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(r[i], &a.big[i], &a.small[i]);
    return a;
  }
  ATTN_DEVICE static B b(uint32_t r0, uint32_t r1) {
    B b;
    split(r0, &b.big[0], &b.small[0]);
    split(r1, &b.big[1], &b.small[1]);
    return b;
  }
  ATTN_DEVICE static void mma(float (&d)[4], const A& a, const B& b) { add(d, a.small, b.big, a.big, b.small, a, b); }
  // The same bits of the transposed product.
  ATTN_DEVICE static void mma_transposed(float (&d)[4], const A& a, const B& b) {
    add(d, a.big, b.small, a.small, b.big, a, b);
  }

 private:
  ATTN_DEVICE static void add(float (&d)[4], const uint32_t (&a1)[4], const uint32_t (&b1)[2], const uint32_t (&a2)[4],
                              const uint32_t (&b2)[2], const A& a, const B& b) {
    // The tensor cores cut off where others round, at the size of the sum so far: so it is added to here, rounded.
    // Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", IJHPCA 2022.
    float step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_tf32(step, a1, b1);
    mma_tf32(step, a2, b2);
    mma_tf32(step, a.big, b.big);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += step[i];
  }
  ATTN_DEVICE static void split(uint32_t x, uint32_t* big, uint32_t* small) {
    *big = (x + kHalfOfTf32) & ~(2 * kHalfOfTf32 - 1);
    *small = bits_of(float_of(x) - float_of(*big));
  }
};

struct TF32 : CutOff {
  ATTN_DEVICE static A a(const uint32_t (&r)[4]) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) a.x[i] = round_to_tf32(float_of(r[i]));
    return a;
  }
  ATTN_DEVICE static B b(uint32_t r0, uint32_t r1) {
    return {{round_to_tf32(float_of(r0)), round_to_tf32(float_of(r1))}};
  }
};

// Accumulators as the left operand of the next product, without moving between lanes. In 16 bits two neighbours make a
// step; in float32 one does, if the summed index is read in the order 0 2 4 6 1 3 5 7 on both sides (load_b_transposed
// does).
//
// They are rounded to elements. What the rounding leaves may be left in d, for another operand.
template <class M, bool kLeavesRest>
ATTN_DEVICE typename M::A a_from_acc(float (*d)[4]) {
  if constexpr (M::kMmaK == 16) {
    const uint32_t r[4] = {M::pack(d[0][0], d[0][1]), M::pack(d[0][2], d[0][3]), M::pack(d[1][0], d[1][1]),
                           M::pack(d[1][2], d[1][3])};
    if constexpr (kLeavesRest) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        d[i >> 1][2 * (i & 1)] -= M::low(r[i]);
        d[i >> 1][2 * (i & 1) + 1] -= M::high(r[i]);
      }
    }
    return M::a(r);
  } else {
    const uint32_t r[4] = {bits_of(d[0][0]), bits_of(d[0][2]), bits_of(d[0][1]), bits_of(d[0][3])};
    return M::a(r);
  }
}

}  // namespace attn_ops::cuda
