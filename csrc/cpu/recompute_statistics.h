// m, l and delta of a tile's rows by a pass over the keys, where what forward left will not do (recomputes_statistics).
#pragma once

#include "backward_tile.h"
#include "scores.h"

namespace attn_ops::cpu {
namespace {

// One tile of recompute_statistics meets keys k0 .. k1. As long as that lasts, m is the maximum so far, inverse_l holds
// the sum of e^(s - m), and delta that of e^(s - m) dp.
template <class E, int NV>
__attribute__((noinline)) void statistics_block(const HeadRows& r, BackwardTile<E>& tile, const KeyRows<E>& keys,
                                                const KeyRows<E>& values, int64_t k0, int64_t k1, NextTask& next,
                                                const BackwardScratch<E>& scratch) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  constexpr int W = S::width, lanes = NV * W;
  const AttentionParams& p = r.p;
  const int64_t n = k1 - k0;
  const bool keeps = tile.kept.s != nullptr;
  T *const s = keeps ? tile.kept.s + (k0 - tile.kept.first) * lanes : scratch.p;
  T *const dp = keeps ? tile.kept.dp + (k0 - tile.kept.first) * lanes : scratch.ds;
  Vec<T> m_old[NV];
  Highest<T, NV> highest;
  for (int v = 0; v < NV; ++v) m_old[v] = highest.of[v] = S::load(tile.m + v * W);
  const Staircase<T> steps(tile, k0, n);
  const Visibility seen = score_block<E, NV>(r, tile, tile.q, lanes, keys, k0, n, steps, scratch.score, s, lanes,
                                             static_cast<T*>(nullptr), highest, next);
  if (keeps) tile.kept.seen_of(k0) = seen;
  if (seen == Visibility::kNothing) return;
  gemm_of_steps<E, NV>(values.at(k0), values.ld(), tile.d_out, lanes, padded_elements<E>(p.value_dim), steps, dp, lanes,
                       [](Vec<T> x) { return x; });
  const bool dropout = p.dropout_rate > 0;
  if (dropout) dropout_factors<T>(Dropout(p, r.batch), tile.position, tile.head, lanes, k0, n, scratch.factors);

  Vec<T> base[NV], l[NV], delta[NV];
  for (int v = 0; v < NV; ++v) {
    base[v] = softmax_base<T>(highest.of[v]);
    l[v] = delta[v] = S::zero();
  }
  const auto met = [&](auto first, auto count, int64_t begin, int64_t end) ATTN_INLINED {
    keeping_awake<E, 48>(begin, end, [&](int64_t from, int64_t to) ATTN_INLINED {
      for (int64_t j = from; j < to; ++j)
        for (int v = decltype(first)::value; v < decltype(first)::value + decltype(count)::value; ++v) {
          const Vec<T> e = exp<E>(S::load(s + j * lanes + v * W) - base[v]);
          Vec<T> weighted = e * S::load(dp + j * lanes + v * W);
          if (dropout) weighted *= S::load(scratch.factors + j * lanes + v * W);
          l[v] += e;
          delta[v] += S::select(e == S::zero(), S::zero(), weighted);  // a hidden key may hold NaN
        }
    });
  };
  by_vectors<NV>(steps, n, met, [](int, int64_t, int64_t) {});
  for (int v = 0; v < NV; ++v) {
    const Vec<T> correction = exp<T>(m_old[v] - base[v]);
    S::store(tile.m + v * W, highest.of[v]);
    S::store(tile.inverse_l + v * W, S::fma(S::load(tile.inverse_l + v * W), correction, l[v]));
    S::store(tile.delta + v * W, S::fma(S::load(tile.delta + v * W), correction, delta[v]));
  }
}

// m, 1 / l and delta of `count` tiles that see keys in begin .. end, from the scores.
template <class E>
void recompute_statistics(const BackwardParams& params, const HeadRows& r, BackwardTile<E>* tiles, int64_t count,
                          int64_t begin, int64_t end, KeyRows<E>& keys, KeyRows<E>& values, NextTask& next,
                          const BackwardScratch<E>& scratch) {
  using T = Accumulator<E>;
  for_each_block(tiles, count, begin, end, r.length_k, keys, values, [&](BackwardTile<E>& t, int64_t k0, int64_t k1) {
    with_vectors(t.nv, [&](auto nv) {
      statistics_block<E, decltype(nv)::value>(r, t, keys, values, k0, k1, next, scratch);
    });
  });
  const T* const d_lse = static_cast<const T*>(params.d_lse);
  for (BackwardTile<E>* t = tiles; t < tiles + count; ++t)
    for (int i = 0; i < t->lanes; ++i) {
      T l = t->inverse_l[i];
      const T correction = i < t->rows ? join_sink(params.forward, t->head[i], &t->m[i], &l) : T{1};
      if (l == 0 || i >= t->rows) {
        t->m[i] = t->inverse_l[i] = t->delta[i] = 0;
        continue;
      }
      t->inverse_l[i] = 1 / l;
      t->delta[i] *= correction * t->inverse_l[i];
      if (d_lse) t->delta[i] -= d_lse[r.statistic(t->position[i], t->head[i])];
    }
}

}  // namespace
}  // namespace attn_ops::cpu
