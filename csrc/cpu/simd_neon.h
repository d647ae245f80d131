// NEON of any 64-bit Arm (ARMv8-A): 16-byte vectors, 32 registers. max, min and select are GCC's own: vmaxq gives NaN
// when either operand is one, vmaxnmq the number, and the contract of simd.h is neither.
#pragma once

#include <arm_neon.h>

#include "simd.h"

namespace attn_ops::cpu {
namespace {

constexpr int kVectorRegisters = 32;

template <>
struct Simd<float> : SimdBase<float, int32_t, 16> {
  static ATTN_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static ATTN_INLINE bool any(I mask) { return vmaxvq_u32((uint32x4_t)mask) != 0; }

  // Products of the even (low) 32-bit halves.
  static ATTN_INLINE Longs multiply_even(Longs a, uint32_t m) {
    return (Longs)vmull_n_u32(vmovn_u64((uint64x2_t)a), m);
  }

  static ATTN_INLINE V load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  // To nearest even: the rounding mode every thread starts with.
  static ATTN_INLINE void store_half(uint16_t* p, V x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

  static ATTN_INLINE void transpose(V* r) {
    const float32x4_t a = vzip1q_f32(r[0], r[2]), b = vzip2q_f32(r[0], r[2]);
    const float32x4_t c = vzip1q_f32(r[1], r[3]), d = vzip2q_f32(r[1], r[3]);
    r[0] = vzip1q_f32(a, c);
    r[1] = vzip2q_f32(a, c);
    r[2] = vzip1q_f32(b, d);
    r[3] = vzip2q_f32(b, d);
  }
  template <class Join>
  static ATTN_INLINE V reduced(V* r, const Join& join) {
    for (int i = 0; i < 2; ++i) r[i] = join(vuzp1q_f32(r[2 * i], r[2 * i + 1]), vuzp2q_f32(r[2 * i], r[2 * i + 1]));
    return join(vuzp1q_f32(r[0], r[1]), vuzp2q_f32(r[0], r[1]));
  }
};

template <>
struct Simd<double> : SimdBase<double, int64_t, 16> {
  static ATTN_INLINE V fma(V a, V b, V c) { return vfmaq_f64(c, a, b); }
  static ATTN_INLINE bool any(I mask) { return vmaxvq_u32((uint32x4_t)mask) != 0; }

  static ATTN_INLINE void transpose(V* r) {
    const float64x2_t a = r[0], b = r[1];
    r[0] = vzip1q_f64(a, b);
    r[1] = vzip2q_f64(a, b);
  }
  template <class Join>
  static ATTN_INLINE V reduced(V* r, const Join& join) {
    return join(vuzp1q_f64(r[0], r[1]), vuzp2q_f64(r[0], r[1]));
  }
};

}  // namespace
}  // namespace attn_ops::cpu
