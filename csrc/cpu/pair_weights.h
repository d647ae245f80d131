// The weights of backward as pairs of bfloat16.
//
//   dv[j] += sum_i p[j][i] d_out[i]     dk[j] += sum_i ds[j][i] q[i]     pairs of two rows
//   dq[i] += sum_j ds[j][i] k[j]                                        pairs of two keys, in two parts
//
// In dq all cancels that the keys have in common (sum_j ds[j] = 0), however large it is: in trained models one channel of
// all keys can be a thousand times the others. The roundings of ds would not cancel, so there ds is the sum of two
// bfloat16.
#pragma once

#include "row_tile.h"

namespace attn_ops::cpu {
namespace {

// p and ds of keys that a tile does not see.
template <class T, int NV>
ATTN_INLINE void no_weights(int64_t keys, T* prob, T* ds, int64_t ld) {
  using S = Simd<T>;
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < NV; ++v) {
      S::store(prob + j * ld + v * S::width, S::zero());
      S::store(ds + j * ld + v * S::width, S::zero());
    }
}

// What dq takes of ds, [key / 2][lanes], two keys an element: rounded, and what that left over.
template <class E>
struct QueryWeights {
  static constexpr int64_t kCount = kOfPairs<E> ? kBlockKeys / 2 * RowTile<Accumulator<E>>::max_lanes : 0;
  E *rounded, *rest;

  static int64_t bytes() { return 2 * Arena::bytes<E>(kCount); }
  explicit QueryWeights(Arena& arena) : rounded(arena.take<E>(kCount)), rest(arena.take<E>(kCount)) {}
};

// p and ds [key][ld] of n keys and a tile whose lanes begin at `lane`: in place, of two rows, and for dq. Joint tiles are
// packed one after the other, each into what those before it have left.
template <class E, int NV, class T>
__attribute__((noinline)) void pack_weights(int64_t n, int64_t lane, T* p, T* ds, int64_t ld,
                                            const QueryWeights<E>& of_query) {
  using S = Simd<T>;
  using P = Product<E>;
  constexpr int W = S::width;
  if (n % 2 != 0) no_weights<T, NV>(1, p + n * ld + lane, ds + n * ld + lane, ld);
  keeping_awake<E, 64>(0, n, [&](int64_t from, int64_t to) ATTN_INLINED {
    for (int64_t j = from; j < to; j += 2)
      for (int v = 0; v < NV; ++v) {
        const auto pack = [=](T* x, Vec<T>& first, Vec<T>& second) {
          T* const row = x + j * ld;
          first = S::load(row + lane + v * W), second = S::load(row + ld + lane + v * W);
          const int64_t to = (lane + v * W) / 2;
          P::store_neighbours(reinterpret_cast<E*>(row) + to, reinterpret_cast<E*>(row + ld) + to, first, second);
        };
        Vec<T> first, second;
        pack(p, first, second);
        pack(ds, first, second);
        const typename P::V rounded = P::pairs(first, second);
        const int64_t at = (j / 2 * NV + v) * W;
        P::store(of_query.rounded + at, rounded);
        P::store(of_query.rest + at, P::pairs(first - P::number(rounded, 0), second - P::number(rounded, 1)));
      }
  });
  const int64_t used = elements<E>(n), behind = padded_elements<E>(n) - used;
  if (behind == 0) return;
  memset(of_query.rounded + used * NV * W, 0, sizeof(E) * behind * NV * W);
  memset(of_query.rest + used * NV * W, 0, sizeof(E) * behind * NV * W);
}

// Zeros behind the weights of the last of `lanes` rows, as far as a matrix unit reads.
template <class E, class T>
void zeros_behind(int64_t n, int64_t lanes, T* p, T* ds) {
  const int64_t used = elements<E>(lanes), behind = padded_elements<E>(lanes) - used;
  for (int64_t j = 0; behind > 0 && j < n; ++j) {
    memset(reinterpret_cast<E*>(p + j * lanes) + used, 0, sizeof(E) * behind);
    memset(reinterpret_cast<E*>(ds + j * lanes) + used, 0, sizeof(E) * behind);
  }
}

}  // namespace
}  // namespace attn_ops::cpu
