// Any CPU: 16-byte vectors, which every 64-bit x86 (SSE2) and Arm (NEON) has.
#pragma once

#include "simd.h"

namespace attn_ops::cpu {
namespace {

constexpr int kVectorRegisters = 16;

template <>
struct Simd<float> : SimdBase<float, int32_t, 16> {
  // Products of the even (low) 32-bit halves.
  static ATTN_INLINE Longs multiply_even(Longs a, uint32_t m) { return (a & 0xffffffffu) * m; }

  // IEEE half -> float: the fields shifted into place, the exponent moved by the difference of the biases (112;
  // infinities and NaN twice). A subnormal becomes 2^-14 + its value, less 2^-14: hosts that flush subnormals, as
  // TensorFlow does, would flush what any way through one gives.
  static ATTN_INLINE V load_half(const uint16_t* p) {
    float out[width];
    for (int i = 0; i < width; ++i) {
      const uint32_t h = p[i], exponent = h & 0x7c00u;
      const uint32_t moved = exponent == 0x7c00u ? 224 : exponent == 0 ? 113 : 112;
      uint32_t bits = ((h & 0x7fffu) << 13) + (moved << 23);
      float x;
      memcpy(&x, &bits, 4);
      if (exponent == 0) x -= 0x1p-14f;
      memcpy(&bits, &x, 4);
      bits |= (h & 0x8000u) << 16;
      memcpy(&out[i], &bits, 4);
    }
    return load(out);
  }

  // float -> half, to nearest even, with subnormals, overflow to infinity and NaN kept.
  static ATTN_INLINE void store_half(uint16_t* p, V v) {
    for (int i = 0; i < width; ++i) {
      uint32_t bits;
      const float x = v[i];
      memcpy(&bits, &x, 4);
      const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
      uint32_t h;
      if (magnitude > 0x7f800000u) {
        h = 0x7e00u;
      } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        h = 0x7c00u;
      } else if (magnitude < 0x38800000u) {   // below 2^-14: adding 0.5 puts the half's last place at the float's
        float m;
        memcpy(&m, &magnitude, 4);
        m += 0.5f;
        memcpy(&h, &m, 4);
        h -= 0x3f000000u;
      } else {
        h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
      }
      p[i] = static_cast<uint16_t>(h | sign);
    }
  }
};

template <>
struct Simd<double> : SimdBase<double, int64_t, 16> {};

}  // namespace
}  // namespace attn_ops::cpu
