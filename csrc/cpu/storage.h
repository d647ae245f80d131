// How an element type lies in memory, and how it becomes a vector of the compute type T (float or double) and back.
//
//   half, bfloat16, int8 -> float    float -> float    double -> double
#pragma once

#include "../attention.h"
#include "simd.h"

namespace attn_ops::cpu {
namespace {

template <class T>
struct Same {
  static constexpr int size = sizeof(T);
  static ATTN_INLINE Vec<T> load(const char* p) { return Simd<T>::load(reinterpret_cast<const T*>(p)); }
  static ATTN_INLINE Vec<T> load(const char* p, int64_t n) { return Simd<T>::load(reinterpret_cast<const T*>(p), n); }
  static ATTN_INLINE void store(char* p, Vec<T> x) { Simd<T>::store(reinterpret_cast<T*>(p), x); }
};

struct Half {
  static constexpr int size = 2;
  static ATTN_INLINE Vec<float> load(const char* p) {
    return Simd<float>::load_half(reinterpret_cast<const uint16_t*>(p));
  }
  static ATTN_INLINE Vec<float> load(const char* p, int64_t n) {
    uint16_t first[Simd<float>::width];
    Simd<float>::load_halves(reinterpret_cast<const uint16_t*>(p), n, first);
    return Simd<float>::load_half(first);
  }
  static ATTN_INLINE void store(char* p, Vec<float> x) {
    Simd<float>::store_half(reinterpret_cast<uint16_t*>(p), x);
  }
};

struct BFloat16 {
  static constexpr int size = 2;
  typedef uint32_t Words __attribute__((vector_size(sizeof(Vec<float>))));
  typedef uint16_t Halves __attribute__((vector_size(sizeof(Vec<float>) / 2)));

  static ATTN_INLINE Vec<float> load(const char* p) {
    Halves h;
    memcpy(&h, p, sizeof h);
    return (Vec<float>)(__builtin_convertvector(h, Words) << 16);
  }
  static ATTN_INLINE Vec<float> load(const char* p, int64_t n) {
    uint16_t first[Simd<float>::width];
    Simd<float>::load_halves(reinterpret_cast<const uint16_t*>(p), n, first);
    return load(reinterpret_cast<const char*>(first));
  }
  // Twice as many numbers, those at even and those at odd places: two operations, where two loads take four.
  static ATTN_INLINE void load_apart(const char* p, Vec<float>* x) {
    Vec<float> both;
    memcpy(&both, p, sizeof both);
    const Words words = (Words)Simd<float>::kept(both);
    x[0] = (Vec<float>)(words << 16);
    x[1] = (Vec<float>)(words & 0xffff0000u);
  }
  // To nearest even; NaN stays NaN (rounding could carry its mantissa away).
  static ATTN_INLINE void store(char* p, Vec<float> x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Words quiet = bits >> 16 | 0x40u;
    const Halves h = __builtin_convertvector(x == x ? rounded : quiet, Halves);
    memcpy(p, &h, sizeof h);
  }
};

// Small integers, to be read only: what they stand for is a multiple of them, which is their row's affair.
struct Int8 {
  static constexpr int size = 1;
  static ATTN_INLINE Vec<float> load(const char* p) {
    return Simd<float>::load_int8(reinterpret_cast<const int8_t*>(p));
  }
  static ATTN_INLINE Vec<float> load(const char* p, int64_t n) {
    return Simd<float>::load_int8(reinterpret_cast<const int8_t*>(p), n);
  }
};

// The dtype of arrays of T.
template <class T>
constexpr DType kDTypeOf = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Calls f with the storage of dtype t, one that T (told by the tag) can come from and go to. Any other dtype has
// another element size: then nothing is read or written.
template <class F>
ATTN_INLINE void with_storage(float, DType t, const F& f) {
  if (t == DType::kFloat32) f(Same<float>{});
  else if (t == DType::kFloat16) f(Half{});
  else if (t == DType::kBFloat16) f(BFloat16{});
}

template <class F>
ATTN_INLINE void with_storage(double, DType, const F& f) {
  f(Same<double>{});
}

// The same of keys and values, which may be int8.
template <class T, class F>
ATTN_INLINE void with_read_storage(T tag, DType t, const F& f) {
  if constexpr (sizeof(T) == 4) {
    if (t == DType::kInt8) return f(Int8{});
  }
  with_storage(tag, t, f);
}

// The first n elements of a vector, `stride` bytes apart; the rest is whatever zero bytes mean.
template <class T, class Storage>
ATTN_INLINE Vec<T> load_some(Storage, const char* p, int64_t stride, int64_t n) {
  constexpr int width = Simd<T>::width;
  if (stride == Storage::size) return n >= width ? Storage::load(p) : Storage::load(p, n);
  char gathered[width * Storage::size] = {};
  for (int64_t i = 0; i < n && i < width; ++i) memcpy(gathered + i * Storage::size, p + i * stride, Storage::size);
  return Storage::load(gathered);
}

template <class T, class Storage>
ATTN_INLINE void store_some(Storage, char* p, int64_t stride, int64_t n, Vec<T> x) {
  constexpr int width = Simd<T>::width;
  if (n >= width && stride == Storage::size) return Storage::store(p, x);
  char scattered[width * Storage::size];
  Storage::store(scattered, x);
  for (int64_t i = 0; i < n && i < width; ++i) memcpy(p + i * stride, scattered + i * Storage::size, Storage::size);
}

}  // namespace
}  // namespace attn_ops::cpu
