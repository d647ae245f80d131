// Which vectors of a tile meet which keys of a block. Of 48 rows on a causal diagonal and as many keys a third of the
// products is nobody's, of the rows of a narrow window or of two documents half: products are made step by step, each of the
// vectors that see its keys, and weights and gradients vector by vector, of the keys that each meets (by_vectors). All else goes
// on as if the block were whole.
#pragma once

#include "gemm.h"
#include "row_tile.h"

namespace attn_ops::cpu {
namespace {

// Keys begin <= k < end of the block, and the vectors that meet them: the first ones of the tile or the last ones.
struct Step {
  int64_t begin, end;
  int first, count;
};

// The steps of a block, in order; keys between them, and vectors beside them, see nothing of each other.
template <class T>
class Staircase {
 public:
  // The keys k0 .. k0 + n, as far as the intervals of the rows say.
  Staircase(const RowTile<T>& tile, int64_t k0, int64_t n) {
    if (tile.all_see(k0, k0 + n)) {
      for (int v = 0; v < tile.nv; ++v) from_[v] = 0, to_[v] = n;
      add({0, n, 0, tile.nv});
      return;
    }
    for (int v = 0; v < tile.nv; ++v) seen_by(tile, v, k0, n, &from_[v], &to_[v]);
    for (int64_t at = 0, next; at < n; at = next) {
      int first = tile.nv, last = -1;
      next = n;
      for (int v = 0; v < tile.nv; ++v) {
        if (from_[v] <= at && at < to_[v]) {
          if (first > v) first = v;
          last = v;
        }
        if (from_[v] > at && from_[v] < next) next = from_[v];
        if (to_[v] > at && to_[v] < next) next = to_[v];
      }
      if (last < 0) continue;
      if (first > 0) last = tile.nv - 1;
      add({at, next, first, last + 1 - first});
    }
  }

  const Step* begin() const { return steps_; }
  const Step* end() const { return steps_ + size_; }
  // Whether all `nv` vectors meet all of the n keys.
  bool whole(int nv, int64_t n) const { return size_ == 1 && steps_[0].count == nv && steps_[0].end - steps_[0].begin == n; }
  // The keys from .. to of the block are those that vector v meets.
  int64_t from(int v) const { return from_[v]; }
  int64_t to(int v) const { return to_[v]; }

 private:
  // Ends of steps are multiples of so many keys: less is no work worth a step.
  static constexpr int64_t kStepKeys = 8;

  static void seen_by(const RowTile<T>& tile, int v, int64_t k0, int64_t n, int64_t* from, int64_t* to) {
    int64_t begin = n, end = 0;
    for (int i = v * Simd<T>::width; i < (v + 1) * Simd<T>::width && i < tile.rows; ++i) {
      if (tile.lo[i] >= tile.hi[i]) continue;
      if (tile.lo[i] - k0 < begin) begin = tile.lo[i] - k0;
      if (tile.hi[i] - k0 > end) end = tile.hi[i] - k0;
    }
    *from = begin <= 0 ? 0 : begin / kStepKeys * kStepKeys;
    *to = end <= 0 ? 0 : end >= n ? n : (end + kStepKeys - 1) / kStepKeys * kStepKeys;
    if (*to > n) *to = n;
    if (*from >= *to) *from = *to = 0;
  }

  void add(const Step& step) {
    Step* const last = size_ > 0 ? &steps_[size_ - 1] : nullptr;
    if (last && last->end == step.begin && last->first == step.first && last->count == step.count) last->end = step.end;
    else steps_[size_++] = step;
  }

  int64_t from_[kMaxVectors], to_[kMaxVectors];
  int size_ = 0;
  Step steps_[2 * kMaxVectors + 1];
};

// met(Vectors<first>{}, Vectors<count>{}, begin, end) for vectors and the keys that they meet: all in one where those are all
// n keys, else each vector alone, with beside(v, begin, end) for the keys that it does not meet, from the first key on.
template <int NV, class T, class Met, class Beside>
ATTN_INLINE void by_vectors(const Staircase<T>& steps, int64_t n, const Met& met, const Beside& beside) {
  if (steps.whole(NV, n)) return met(Vectors<0>{}, Vectors<NV>{}, int64_t{0}, n);
  each_vector<NV>([&](auto vector) {
    constexpr int v = decltype(vector)::value;
    beside(v, int64_t{0}, steps.from(v));
    met(vector, Vectors<1>{}, steps.from(v), steps.to(v));
    beside(v, steps.to(v), n);
  });
}

// Calls f(Vectors<first>{}, Vectors<count>{}) for the vectors of a step, of NV.
template <int NV, class F>
ATTN_INLINE void with_part(const Step& step, const F& f) {
  if (step.count == NV) return f(Vectors<0>{}, Vectors<NV>{});
  if constexpr (NV == 3) {
    if (step.count == 2) return step.first == 0 ? f(Vectors<0>{}, Vectors<2>{}) : f(Vectors<1>{}, Vectors<2>{});
  }
  if constexpr (NV > 1) return step.first == 0 ? f(Vectors<0>{}, Vectors<1>{}) : f(Vectors<NV - 1>{}, Vectors<1>{});
}

// gemm of sums over columns, a(r, k) = a[r * lda + k], of the keys r and the vectors that meet: c[r * ldc + lane] =
// made(sum).
template <class E, int NV, class T, class Made, class Meanwhile = Nothing>
ATTN_INLINE void gemm_of_steps(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, const Staircase<T>& steps,
                               T* c, int64_t ldc, const Made& made, const Meanwhile& meanwhile = {}) {
  constexpr int W = Simd<T>::width;
  for (const Step& step : steps)
    with_part<NV>(step, [&](auto first, auto count) {
      T* const at = c + step.begin * ldc + decltype(first)::value * W;
      gemm<E, decltype(count)::value, Major::kRow>(
          step.end - step.begin, a + step.begin * lda, lda, b + decltype(first)::value * W, ldb, depth,
          [=](int64_t r, int v, Vec<T> x) { Simd<T>::store(at + r * ldc + v * W, made(x)); }, meanwhile);
    });
}

// gemm of sums over keys, a(r, k) = a[r + k * lda], in steps.
template <class E, int NV, class T, class Epilogue>
__attribute__((noinline)) void gemm_in_steps(int64_t rows, const E* a, int64_t lda, const E* b, int64_t ldb,
                                             const Staircase<T>& steps, const Epilogue& epilogue) {
  constexpr int R = tile_rows(NV);
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    Vec<T> acc[R][NV];
    clear(acc);
    for (const Step& step : steps) {
      const int64_t begin = step.begin / Product<E>::numbers, depth = elements<E>(step.end) - begin;
      with_part<NV>(step, [&](auto first, auto count) {
        add_products<E, R, NV, Major::kDepth, decltype(first)::value, decltype(count)::value>(
            a + r + begin * lda, lda, b + begin * ldb, ldb, depth, acc);
      });
    }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < NV; ++v) epilogue(r + i, v, acc[i][v]);
  }
  const int64_t begin = steps.begin()->begin / Product<E>::numbers, end = elements<E>((steps.end() - 1)->end);
  gemm_rest<E, NV, Major::kDepth>(rows, r, a + begin * lda, lda, b + begin * ldb, ldb, end - begin, epilogue);
}

// gemm of sums over keys by a matrix unit, a(r, k) = a[r * lda + k]: each vector takes what it meets.
template <class E, int NV, class T, class Epilogue>
__attribute__((noinline)) void gemm_by_vectors(int64_t rows, const E* a, int64_t lda, const E* b, int64_t ldb,
                                               const Staircase<T>& steps, const Epilogue& epilogue) {
  each_vector<NV>([&](auto vector) {
    constexpr int v = decltype(vector)::value;
    const int64_t begin = steps.from(v) / kTileNumbers<E> * MatrixUnit<E>::depth, end = elements<E>(steps.to(v));
    gemm<E, 1, Major::kRow>(rows, a + begin, lda, b + begin * ldb + v * Simd<T>::width, ldb, end - begin,
                            [&](int64_t r, int, Vec<T> x) { epilogue(r, v, x); });
  });
}

// gemm of sums over the n keys, with `a` as kOverKeys says, where b is 0 beside the steps.
template <class E, int NV, class T, class Epilogue, class Meanwhile = Nothing>
ATTN_INLINE void gemm_over_keys(int64_t rows, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t n,
                                const Staircase<T>& steps, const Epilogue& epilogue, const Meanwhile& meanwhile = {}) {
  if (steps.whole(NV, n)) gemm<E, NV, kOverKeys<E>>(rows, a, lda, b, ldb, elements<E>(n), epilogue, meanwhile);
  else if constexpr (kOfTiles<E>) gemm_by_vectors<E, NV>(rows, a, lda, b, ldb, steps, epilogue);
  else gemm_in_steps<E, NV>(rows, a, lda, b, ldb, steps, epilogue);
}

}  // namespace
}  // namespace attn_ops::cpu
