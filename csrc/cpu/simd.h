// Vectors of float and double for the instruction set this file is compiled for.
//
// GCC's vector extension gives + - * / and comparisons for every width; a simd_<isa>.h adds the width and the few
// operations the extension cannot say well. Everything sits in an unnamed namespace: kernels.cc is compiled once
// per ISA, and a function shared by two copies through the linker would run AVX-512 code on an SSE machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define ATTN_INLINE inline __attribute__((always_inline))
#define ATTN_INLINED __attribute__((always_inline))  // of a lambda, behind its arguments

namespace attn_ops::cpu {
namespace {

template <class T>
struct Simd;  // Simd<float>, Simd<double>: specialised by simd_<isa>.h

template <class T>
using Vec = typename Simd<T>::V;

// What holds for every instruction set. Loads and stores need no alignment: TensorFlow slices have none.
template <class T, class Int, int kBytes>
struct SimdBase {
  typedef T V __attribute__((vector_size(kBytes)));
  typedef Int I __attribute__((vector_size(kBytes)));
  typedef uint64_t Longs __attribute__((vector_size(kBytes)));
  typedef T Unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
  static constexpr int width = kBytes / sizeof(T);

  static ATTN_INLINE V zero() { return V{}; }
  static ATTN_INLINE V set1(T x) { return x - V{}; }  // "- 0" keeps the sign of -0.0, "+ 0" would not
  static ATTN_INLINE V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static ATTN_INLINE void store(T* p, V x) { *reinterpret_cast<Unaligned*>(p) = x; }
  // The first n elements, 0 <= n < width, and zeros. Nothing past them is read or written: they may end where memory
  // does.
  static ATTN_INLINE V load(const T* p, int64_t n) {
    T first[width] = {};
    memcpy(first, p, n * sizeof(T));
    return load(first);
  }
  static ATTN_INLINE void store(T* p, V x, int64_t n) { memcpy(p, &x, n * sizeof(T)); }
  // The first n halves, 0 <= n < width, and zeros, into `first` of `width`.
  static ATTN_INLINE void load_halves(const uint16_t* p, int64_t n, uint16_t* first) {
    memset(first, 0, width * sizeof(uint16_t));
    memcpy(first, p, n * sizeof(uint16_t));
  }
  static ATTN_INLINE V load_int8(const int8_t* p) {
    typedef int8_t Bytes __attribute__((vector_size(width)));
    Bytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, I), V);
  }
  // The first n, 0 <= n < width, and zeros. In registers: what the stack got in pieces cannot be forwarded to a load of the
  // whole.
  static ATTN_INLINE V load_int8(const int8_t* p, int64_t n) {
    static_assert(width <= 8, "as many as a word holds");
    uint64_t bytes = 0;
    if (n >= 4) {
      uint32_t first, last;
      memcpy(&first, p, 4);
      memcpy(&last, p + n - 4, 4);
      bytes = first | static_cast<uint64_t>(last) << 8 * (n - 4);
    } else {
      for (int64_t i = 0; i < n; ++i) bytes |= static_cast<uint64_t>(static_cast<uint8_t>(p[i])) << 8 * i;
    }
    int8_t all[8];
    memcpy(all, &bytes, sizeof all);
    return Simd<T>::load_int8(all);
  }
  // x, in a register from here on: without this the compiler would load it again for each of its uses.
  static ATTN_INLINE V kept(V x) {
#if defined(__aarch64__)
    asm("" : "+w"(x));
#elif defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    if constexpr (kBytes <= 32) asm("" : "+x"(x));  // else emulated (tests/avx512): no register holds it
#endif
    return x;
  }
  static ATTN_INLINE V select(I mask, V yes, V no) { return mask ? yes : no; }
  static ATTN_INLINE V fma(V a, V b, V c) { return a * b + c; }  // contracted to one instruction where there is one

  // Both return b when either is NaN, so a NaN passed as b survives and one passed as a is dropped.
  static ATTN_INLINE V max(V a, V b) { return a > b ? a : b; }
  static ATTN_INLINE V min(V a, V b) { return a < b ? a : b; }

  // The low 32-bit halves of even and odd numbers in turn.
  static ATTN_INLINE Longs low_halves(Longs even, Longs odd) { return (even & 0xffffffffu) | odd << 32; }

  // r[i][j] <-> r[j][i]
  static ATTN_INLINE void transpose(V* r) {
    for (int i = 0; i < width; ++i)
      for (int j = 0; j < i; ++j) {
        const T t = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = t;
      }
  }


  // Lane i is what the lanes of r[i] give when two become one, in pairs; r is overwritten.
  template <class Join>
  static ATTN_INLINE V reduced(V* r, const Join& join) {
    transpose(r);
    for (int half = width / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) r[i] = join(r[i], r[i + half]);
    return r[0];
  }

  // Whether all lanes are.
  static ATTN_INLINE bool finite(V x) { return !Simd<T>::any(x - x != V{}); }

  static ATTN_INLINE bool any(I mask) {
    Int bits = 0;
    for (int i = 0; i < width; ++i) bits |= mask[i];
    return bits != 0;
  }
};

// Lane i is the sum, or the maximum, of the lanes of r[i], for `width` vectors, which are overwritten.
template <class T>
ATTN_INLINE typename Simd<T>::V sums(typename Simd<T>::V* r) {
  return Simd<T>::reduced(r, [](auto a, auto b) { return a + b; });
}
template <class T>
ATTN_INLINE typename Simd<T>::V maxima(typename Simd<T>::V* r) {
  return Simd<T>::reduced(r, [](auto a, auto b) { return Simd<T>::max(a, b); });
}

// Two bfloat16, of which some instruction sets multiply and add both at once.
struct Pair {
  uint16_t first, second;
};

// What products are made of, numbers or pairs of them, as vectors: the kernels are templates over it. Sums and all that
// is not a product are of Accumulator<E>. An instruction set that has products of pairs specialises this for Pair.
template <class E>
struct Product {
  using V = Vec<E>;
  static constexpr int numbers = 1;  // in an E
  static ATTN_INLINE V load(const E* p) { return Simd<E>::load(p); }
  static ATTN_INLINE V set1(const E* p) { return Simd<E>::set1(*p); }
  static ATTN_INLINE V add(V x, V y, V sum) { return Simd<E>::fma(x, y, sum); }
  static ATTN_INLINE V number(V x, int) { return x; }
  // x, and 0 where the weight is.
  static ATTN_INLINE V hidden(V weight, V x) {
    return Simd<E>::select(weight == Simd<E>::zero(), Simd<E>::zero(), x);
  }
};

template <class E>
struct AccumulatorOf {
  using T = E;
};
template <>
struct AccumulatorOf<Pair> {
  using T = float;
};
template <class E>
using Accumulator = typename AccumulatorOf<E>::T;
template <class E>
constexpr bool kOfPairs = std::is_same_v<E, Pair>;

// How many E hold n numbers.
template <class E>
constexpr int64_t elements(int64_t n) {
  return kOfPairs<E> ? (n + 1) / 2 : n;
}

// What multiplies whole tiles of E, where the instruction set has it: gemm_tiles.h, and simd_<isa>.h for what specialises
// this. It takes `depth` elements of a row at a time, zeros among them where there is nothing.
template <class E>
struct MatrixUnit {
  static constexpr int64_t depth = 1;
  struct Session {};  // as long as one lives, its thread may use the unit
  struct AsUnit {};   // as long as one lives, vectors take subnormal numbers for what the unit takes them
  static ATTN_INLINE void stay_awake() {}
};
template <class E>
constexpr bool kOfTiles = MatrixUnit<E>::depth > 1;

template <class E>
constexpr int64_t whole_tiles(int64_t elements) {
  return (elements + MatrixUnit<E>::depth - 1) / MatrixUnit<E>::depth * MatrixUnit<E>::depth;
}
// How many E a row of n numbers takes that is summed over, with the zeros behind them.
template <class E>
constexpr int64_t padded_elements(int64_t n) {
  return whole_tiles<E>(elements<E>(n));
}
// How many numbers the unit takes at a time.
template <class E>
constexpr int64_t kTileNumbers = MatrixUnit<E>::depth * Product<E>::numbers;

}  // namespace
}  // namespace attn_ops::cpu
