// The one matrix product every step of attention is made of, on a tile that lives in registers:
//
//   c[r][j] = epilogue( sum_{k < depth} a(r, k) * b[k][j] )        r < rows,  j < NV * width
//
// a is read one scalar at a time and broadcast, so it is used where it lies, whichever way it is stored; b is read
// in whole vectors. The tile is R x NV accumulators; R is as large as the register file allows. Of pairs (simd.h) a(r, k)
// and b[k][j] are two numbers each, and depth counts pairs.
#pragma once

#include "gemm_tiles.h"
#include "simd.h"
#include "vectors.h"

namespace attn_ops::cpu {
namespace {

// Accumulators R * NV, plus NV vectors of b and one broadcast, must fit in the registers; fewer than 8 accumulators
// could not hide the latency of FMA (4 cycles, 2 per cycle).
constexpr int tile_rows(int nv) { return kVectorRegisters == 32 ? (nv > 1 ? 8 : 16)
                                                                : (nv == 3 ? 4 : nv == 2 ? 6 : 8); }

// How `a` is stored: a(r, k) = a[r * lda + k] or a[r + k * lda].
enum class Major { kRow, kDepth };

// What is summed over keys has them so: a matrix unit takes rows only.
template <class E>
constexpr Major kOverKeys = kOfTiles<E> ? Major::kRow : Major::kDepth;

template <class V, int R, int NV>
ATTN_INLINE void clear(V (&acc)[R][NV]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
}

// acc[r][v] += the sum for the vectors kFirst .. kFirst + kCount of the NV.
template <class E, int R, int NV, Major M, int kFirst, int kCount>
ATTN_INLINE void add_products(const E* __restrict__ a, int64_t lda, const E* __restrict__ b, int64_t ldb, int64_t depth,
                              Vec<Accumulator<E>> (&acc)[R][NV]) {
  using P = Product<E>;
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    typename P::V bk[kCount];
    for (int v = 0; v < kCount; ++v) bk[v] = P::load(b + k * ldb + (kFirst + v) * Simd<Accumulator<E>>::width);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename P::V x = P::set1(M == Major::kRow ? a + r * lda + k : a + r + k * lda);
      for (int v = 0; v < kCount; ++v) acc[r][kFirst + v] = P::add(x, bk[v], acc[r][kFirst + v]);
    }
  }
}

template <class E, int R, int NV, Major M, class Epilogue>
ATTN_INLINE void gemm_tile(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, const Epilogue& epilogue,
                           int64_t row) {
  Vec<Accumulator<E>> acc[R][NV];
  clear(acc);
  add_products<E, R, NV, M, 0, NV>(a, lda, b, ldb, depth, acc);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) epilogue(row + r, v, acc[r][v]);
}

// The rows from `r` on, fewer than a full tile has: halves, and what is left in one more half with rows before it, or alone.
// A single row has so few sums that each waits for the one before, and takes as long as three or four of a half.
template <class E, int NV, Major M, class Epilogue>
ATTN_INLINE void gemm_rest(int64_t rows, int64_t r, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth,
                           const Epilogue& epilogue) {
  constexpr int kHalf = tile_rows(NV) / 2;
  const int64_t step = M == Major::kRow ? lda : 1, last_half = rows - kHalf;
  for (; r <= last_half; r += kHalf) gemm_tile<E, kHalf, NV, M>(a + r * step, lda, b, ldb, depth, epilogue, r);
  if (kHalf > 2 && last_half >= 0 && rows - r > 1) {
    const auto of_rest = [&](int64_t row, int v, Vec<Accumulator<E>> x) {
      if (row >= r) epilogue(row, v, x);
    };
    return gemm_tile<E, kHalf, NV, M>(a + last_half * step, lda, b, ldb, depth, of_rest, last_half);
  }
  for (; r < rows; ++r) gemm_tile<E, 1, NV, M>(a + r * step, lda, b, ldb, depth, epilogue, r);
}

struct Nothing {
  ATTN_INLINE void operator()() const {}
};

// How many full tiles gemm() makes of rows: about, for other numbers of vectors than the most make others.
template <class E>
constexpr int64_t full_tiles(int64_t rows) {
  return rows / (kOfTiles<E> ? kUnitRows<kMaxVectors> * Simd<Accumulator<E>>::width : tile_rows(kMaxVectors));
}

// All rows. epilogue(r, v, sum) stores vector v of row r; meanwhile() is called before each full tile.
template <class E, int NV, Major M, class Epilogue, class Meanwhile = Nothing>
ATTN_INLINE void gemm(int64_t rows, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth,
                      const Epilogue& epilogue, const Meanwhile& meanwhile = {}) {
  if constexpr (kOfTiles<E>) {
    static_assert(M == Major::kRow);
    return unit_gemm<E, NV>(rows, a, lda, b, ldb, depth, epilogue, meanwhile);
  }
  constexpr int R = tile_rows(NV);
  const int64_t step = M == Major::kRow ? lda : 1;
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    meanwhile();
    gemm_tile<E, R, NV, M>(a + r * step, lda, b, ldb, depth, epilogue, r);
  }
  gemm_rest<E, NV, M>(rows, r, a, lda, b, ldb, depth, epilogue);
}

// The same product for blocks that are partly masked and whose other factor holds Inf or NaN: a masked probability
// is exactly 0 and must hide what it is multiplied with, but 0 * NaN is NaN. Terms whose probability is 0 are
// therefore left out. Rare, so plain.
enum class ZeroHides { kA, kB };

struct FromZero {
  ATTN_INLINE float operator()(int64_t, int) const { return 0; }
};

// Sums begin with first(r, v).
template <class E, int NV, Major M, ZeroHides Z, class Epilogue, class First = FromZero>
__attribute__((noinline)) void gemm_hiding(int64_t rows, const E* a, int64_t lda, const E* b, int64_t ldb,
                                           int64_t depth, const Epilogue& epilogue, const First& first = {}) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  using P = Product<E>;
  [[maybe_unused]] const typename MatrixUnit<E>::AsUnit as_unit;
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < NV; ++v) {
      Vec<T> acc = S::zero() + first(r, v);
      const auto x = [=](int64_t k) { return P::set1(M == Major::kRow ? a + r * lda + k : a + r + k * lda); };
      const auto y = [=](int64_t k) { return P::load(b + k * ldb + v * S::width); };
      const auto seen_x = [=](int64_t k) { return Z == ZeroHides::kA ? x(k) : P::hidden(y(k), x(k)); };
      const auto seen_y = [=](int64_t k) { return Z == ZeroHides::kA ? P::hidden(x(k), y(k)) : y(k); };
      if constexpr (kOfTiles<E>) {
        acc = added_by_unit<E>(acc, depth, seen_x, seen_y);
      } else {
        for (int64_t k = 0; k < depth; ++k) acc = P::add(seen_x(k), seen_y(k), acc);
      }
      epilogue(r, v, acc);
    }
}

// c[rows][columns] += a b for `columns` a multiple of the vector width: panels of up to kMaxVectors vectors, evenly.
template <class E, Major M>
ATTN_INLINE void gemm_accumulate(int64_t rows, int64_t columns, const E* a, int64_t lda, const E* b, int64_t ldb,
                                 int64_t depth, bool hide_zero_a, Accumulator<E>* c, int64_t ldc) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  int64_t left = columns / S::width;
  while (left > 0) {
    const int nv = left >= 5 || left == 3 ? 3 : left >= 2 ? 2 : 1;  // 4 = 2 + 2
    const auto panel = [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      const auto at = [=](int64_t r, int v) { return c + r * ldc + v * S::width; };
      if constexpr (kOfTiles<E>) {
        if (!hide_zero_a) return unit_accumulate<E, NV>(rows, a, lda, b, ldb, depth, c, ldc);
        gemm_hiding<E, NV, M, ZeroHides::kA>(
            rows, a, lda, b, ldb, depth, [=](int64_t r, int v, Vec<T> sum) { S::store(at(r, v), sum); },
            [=](int64_t r, int v) { return S::load(at(r, v)); });
      } else {
        const auto add = [=](int64_t r, int v, Vec<T> sum) { S::store(at(r, v), S::load(at(r, v)) + sum); };
        if (hide_zero_a) gemm_hiding<E, NV, M, ZeroHides::kA>(rows, a, lda, b, ldb, depth, add);
        else gemm<E, NV, M>(rows, a, lda, b, ldb, depth, add);
      }
    };
    with_vectors(nv, panel);
    b += nv * S::width;
    c += nv * S::width;
    left -= nv;
  }
}

}  // namespace
}  // namespace attn_ops::cpu
