// The product of gemm.h by a matrix unit (simd.h), whose registers are tiles of as many rows and columns as a vector has
// lanes:
//
//   c[r][j] = epilogue( sum_{k < depth} a[r][k] * b[k][j] )
//
// a and b are read in whole tiles: up to so many rows of a behind the last one, whatever they hold, and elements up to a
// multiple of MatrixUnit::depth, which have to be zeros in one of the two and numbers in the other.
#pragma once

#include <cstring>

#include "simd.h"
#include "vectors.h"

namespace attn_ops::cpu {
namespace {

// f(from, to) for the keys begin .. end, in parts of kKeys between which a matrix unit is kept awake.
template <class E, int kKeys, class F>
ATTN_INLINE void keeping_awake(int64_t begin, int64_t end, const F& f) {
  if constexpr (kOfTiles<E>) {
    for (; begin + kKeys < end; begin += kKeys) {
      f(begin, begin + kKeys);
      MatrixUnit<E>::stay_awake();
    }
  }
  f(begin, end);
}

// Rows of tiles whose sums with NV vectors are made side by side: as many as leave two tiles for the factors.
template <int NV>
constexpr int kUnitRows = NV == 1 ? 4 : 2;

// R x NV tiles of sums, of a matrix unit: tiles 0 .. R NV - 1 are theirs, the last two a's and b's. From one row of tiles to the
// next the vectors come in the other order, so that the last tile of b serves twice. `adds`: to what is there.
template <class E, int R, int NV, bool adds>
ATTN_INLINE void unit_sums(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, Accumulator<E>* sums, int64_t ld) {
  using U = MatrixUnit<E>;
  constexpr int kSize = Simd<Accumulator<E>>::width, kA = U::tiles - 2, kB = U::tiles - 1;
  static_assert(R * NV <= kA, "tiles for sums");
  each_vector<R * NV>([&](auto tile) ATTN_INLINED {
    constexpr int t = decltype(tile)::value;
    if constexpr (adds) U::template load<t>(sums + t / NV * kSize * ld + t % NV * kSize, ld);
    else U::template zero<t>();
  });
  for (int64_t k = 0; k < depth; k += U::depth)
    each_vector<R>([&](auto row) ATTN_INLINED {
      constexpr int r = decltype(row)::value;
      U::template load<kA>(a + r * kSize * lda + k, lda);
      each_vector<NV>([&](auto vector) ATTN_INLINED {
        constexpr int i = decltype(vector)::value, v = r % 2 == 0 ? i : NV - 1 - i;
        if (r == 0 || i > 0) U::template load<kB>(b + k * ldb + v * kSize, ldb);
        U::template add<r * NV + v, kA, kB>();
      });
    });
  each_vector<R * NV>([&](auto tile) ATTN_INLINED {
    constexpr int t = decltype(tile)::value;
    U::template store<t>(sums + t / NV * kSize * ld + t % NV * kSize, ld);
  });
}

// gemm of a matrix unit.
template <class E, int NV, class Epilogue, class Meanwhile>
ATTN_INLINE void unit_gemm(int64_t rows, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth,
                           const Epilogue& epilogue, const Meanwhile& meanwhile) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  constexpr int kSize = S::width;
  alignas(64) T sums[kUnitRows<NV> * kSize * NV * kSize];
  const auto finish = [&](int64_t first, int64_t count) ATTN_INLINED {
    for (int64_t r = 0; r < count; ++r)
      for (int v = 0; v < NV; ++v) epilogue(first + r, v, S::load(sums + (r * NV + v) * kSize));
  };
  int64_t r = 0;
  for (constexpr int64_t step = kUnitRows<NV> * kSize; r + step <= rows; r += step) {
    meanwhile();
    unit_sums<E, kUnitRows<NV>, NV, false>(a + r * lda, lda, b, ldb, depth, sums, NV * kSize);
    finish(r, step);
  }
  for (; r < rows; r += kSize) {
    meanwhile();
    unit_sums<E, 1, NV, false>(a + r * lda, lda, b, ldb, depth, sums, NV * kSize);
    finish(r, rows - r < kSize ? rows - r : kSize);
  }
}

// c[r * ldc + j] += the product
template <class E, int NV>
ATTN_INLINE void unit_accumulate(int64_t rows, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth,
                                 Accumulator<E>* c, int64_t ldc) {
  using T = Accumulator<E>;
  constexpr int kSize = Simd<T>::width;
  int64_t r = 0;
  for (constexpr int64_t step = kUnitRows<NV> * kSize; r + step <= rows; r += step)
    unit_sums<E, kUnitRows<NV>, NV, true>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc);
  for (; r + kSize <= rows; r += kSize) unit_sums<E, 1, NV, true>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc);
  if (r == rows) return;
  alignas(64) T rest[kSize * NV * kSize] = {};
  for (int64_t i = 0; i < rows - r; ++i) memcpy(rest + i * NV * kSize, c + (r + i) * ldc, NV * kSize * sizeof(T));
  unit_sums<E, 1, NV, true>(a + r * lda, lda, b, ldb, depth, rest, NV * kSize);
  for (int64_t i = 0; i < rows - r; ++i) memcpy(c + (r + i) * ldc, rest + i * NV * kSize, NV * kSize * sizeof(T));
}

// What a unit adds to `sum` of the numbers of `depth` elements at most, x(k) times y(k): the first and the second of each pair by
// themselves, in order.
template <class E, class X, class Y>
ATTN_INLINE Vec<Accumulator<E>> added_by_unit(Vec<Accumulator<E>> sum, int64_t depth, const X& x, const Y& y) {
  using S = Simd<Accumulator<E>>;
  for (int64_t k0 = 0; k0 < depth; k0 += MatrixUnit<E>::depth) {
    const int64_t end = depth < k0 + MatrixUnit<E>::depth ? depth : k0 + MatrixUnit<E>::depth;
    Vec<Accumulator<E>> first = S::zero(), second = S::zero();
    for (int64_t k = k0; k < end; ++k) {
      const auto a = x(k), b = y(k);
      first = S::fma(Product<E>::number(a, 0), Product<E>::number(b, 0), first);
      second = S::fma(Product<E>::number(a, 1), Product<E>::number(b, 1), second);
    }
    sum += first + second;
  }
  return sum;
}

}  // namespace
}  // namespace attn_ops::cpu
