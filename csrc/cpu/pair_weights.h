// The weights of backward as pairs of bfloat16, and what their rounding would cost dq.
//
//   dq = scale sum_j ds[j] k[j]        sum_j ds[j] = 0
//
// What the keys have in common cancels, however large it is: in trained models one channel of all keys can be a
// thousand times the others. The roundings of ds do not cancel, so they are added up, and in the end are given to keys
// that the row sees: dq += scale (sum_j ds[j] - rounded ds[j]) k. Where all rows see the same some keys that is their
// mean, which adds no error of its own; else for each row it is one of those it sees.
#pragma once

#include "scores.h"

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

// What one tile's roundings of ds have lost, and who gets it.
template <class T>
struct RoundingLoss {
  T lost[RowTile<T>::max_lanes];
  int64_t key[RowTile<T>::max_lanes];  // one that the lane sees, or -1
  bool keys_found;                     // of all lanes, or none is looked for

  void start(const HeadRows& r, const RowTile<T>& tile) {
    for (int i = 0; i < tile.lanes; ++i) lost[i] = 0, key[i] = -1;
    keys_found = of_common_keys(r, tile);
  }

  static bool of_common_keys(const HeadRows& r, const RowTile<T>& tile) {
    return tile.all_begin < tile.all_end && !hides_by_bits(r.p) && !added_may_hide(r.p);
  }

  // Looks through keys k0 .. k0 + n: a weight that is not 0 tells that the lane sees the key.
  void find_keys(int lanes, int64_t k0, int64_t n, const T* ds, int64_t ld) {
    if (keys_found) return;
    keys_found = true;
    for (int i = 0; i < lanes; ++i) {
      for (int64_t j = 0; key[i] < 0 && j < n; ++j)
        if (ds[j * ld + i] != 0) key[i] = k0 + j;
      keys_found = keys_found && key[i] >= 0;
    }
  }
};

// The p and ds [key][ld] of n keys from k0 on as pairs of two rows, in place, and ds once more with two keys an element,
// [key / 2][lanes]. Joint tiles are packed one after the other, each into what those before it have left.
template <class E, int NV, class T>
__attribute__((noinline)) void pack_weights(RoundingLoss<T>& loss, int64_t k0, int64_t n, int64_t lane, T* p, T* ds,
                                            int64_t ld, E* ds_pairs) {
  using S = Simd<T>;
  using P = Product<E>;
  constexpr int W = S::width;
  loss.find_keys(NV * W, k0, n, ds + lane, ld);
  if (n % 2 != 0) no_weights<T, NV>(1, p + n * ld + lane, ds + n * ld + lane, ld);
  Vec<T> lost[NV];
  for (int v = 0; v < NV; ++v) lost[v] = S::zero();
  for (int64_t j = 0; j < n; j += 2)
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
      const typename P::V pairs = P::pairs(first, second);
      P::store(ds_pairs + (j / 2 * NV + v) * W, pairs);
      lost[v] += (first - P::number(pairs, 0)) + (second - P::number(pairs, 1));
    }
  for (int v = 0; v < NV; ++v) S::store(loss.lost + v * W, S::load(loss.lost + v * W) + lost[v]);
}

// dq [head_dim][lanes] += lost k
template <class T>
void give_back(const HeadRows& r, const RowTile<T>& tile, const RoundingLoss<T>& loss, T* dq) {
  using S = Simd<T>;
  constexpr int W = S::width;
  const AttentionParams& p = r.p;
  const int lanes = tile.lanes;
  const auto lost_of = [&](int lane) {  // of a row of Inf or NaN nothing
    const Vec<T> lost = S::load(loss.lost + lane);
    return S::select(lost - lost == S::zero(), lost, S::zero());
  };
  if (!RoundingLoss<T>::of_common_keys(r, tile)) {
    for (int i = 0; i < lanes; i += W) {
      const char* row[W];
      T found[W];
      for (int l = 0; l < W; ++l) {
        const int64_t key = loss.key[i + l];
        row[l] = r.key_row(p.k, key < 0 ? 0 : key);
        found[l] = key < 0 ? 0 : 1;
      }
      const Vec<T> by = lost_of(i) * S::load(found);
      load_transposed<T>(p.k.dtype, row, W, W, p.k.step(), p.head_dim, dq + i, lanes, [=](T* at, Vec<T> k) {
        const Vec<T> was = S::load(at);
        S::store(at, S::select(by == S::zero(), was, S::fma(by, k, was)));
      });
    }
    return;
  }
  const int64_t keys = tile.all_end - tile.all_begin, count = keys < kMeanKeys ? keys : kMeanKeys;
  const char* row[kMeanKeys];
  for (int64_t c = 0; c < count; ++c) row[c] = r.key_row(p.k, tile.all_begin + c * keys / count);
  Vec<T> by[kMaxVectors];
  for (int i = 0; i < lanes; i += W) by[i / W] = lost_of(i) * S::set1(1 / static_cast<T>(count));
  with_storage(T{}, p.k.dtype, [&](auto storage) {
    for (int64_t d = 0; d < p.head_dim; d += W) {
      Vec<T> sum = S::zero();
      for (int64_t c = 0; c < count; ++c)
        sum += load_some<T>(storage, row[c] + d * p.k.step(), p.k.step(), p.head_dim - d);
      for (int64_t e = 0; e < W && d + e < p.head_dim; ++e)
        for (int i = 0; i < lanes; i += W) {
          T* const at = dq + (d + e) * lanes + i;
          S::store(at, S::fma(by[i / W], S::set1(sum[e]), S::load(at)));
        }
    }
  });
}

}  // namespace
}  // namespace attn_ops::cpu
