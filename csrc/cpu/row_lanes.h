// Forward: out = softmax(scores, masked) v, one pass over the keys, transposed. What happens to a score is in scores.h.
//
// For a tile of rows (one per vector lane) and a block of keys:
//   s[j][i]  = sum_d k[j][d] q'[d][i]             q' = scale q, packed once per tile
//   m'       = max(m, max_j s)                    c = e^(m - m')
//   p[j][i]  = e^(s - m')                         l = c l + sum_j p
//   o[d][i]  = c o + sum_j v[j][d] p[j][i]
// and at the end out = o / l, lse = m + ln l. Maxima, sums and corrections are plain vectors: nothing is
// ever reduced across lanes. Of pairs (simd.h) p is rounded to bfloat16 for the second product, and l is the sum of what
// it was before.
#pragma once

#include "kernels.h"
#include "row_tile.h"
#include "rows_ahead.h"
#include "scores.h"

namespace attn_ops::cpu {
namespace {

template <class E, class T = Accumulator<E>>
struct ForwardTile : RowTile<T> {
  E* q;    // [head_dim][lanes]
  T* out;  // [value_dim][lanes]
  T m[RowTile<T>::max_lanes], l[RowTile<T>::max_lanes];
};

template <class E, class T = Accumulator<E>>
struct RowLanesScratch {
  ForwardTile<E> tiles[kForwardTiles];
  T *scores, *factors;
  ScoreScratch<T> score;

  static int64_t bytes(const AttentionParams& p) {
    return Arena::bytes<RowLanesScratch>(1) + KeyRows<E>::bytes(p, p.head_dim) + KeyPairs<E>::bytes(p, p.value_dim) +
           kForwardTiles * (Arena::bytes<E>(RowTile<T>::max_lanes * padded_elements<E>(p.head_dim)) +
                            Arena::bytes<T>(RowTile<T>::max_lanes * p.value_dim)) +
           2 * Arena::bytes<T>(kBlockKeys * RowTile<T>::max_lanes) + ScoreScratch<T>::bytes(p);
  }

  static RowLanesScratch& in(const AttentionParams& p, Arena* arena) {
    RowLanesScratch& scratch = *arena->take<RowLanesScratch>(1);
    for (ForwardTile<E>& tile : scratch.tiles) {
      tile.q = arena->take<E>(RowTile<T>::max_lanes * padded_elements<E>(p.head_dim));
      tile.out = arena->take<T>(RowTile<T>::max_lanes * p.value_dim);
    }
    scratch.scores = arena->take<T>(kBlockKeys * RowTile<T>::max_lanes);
    scratch.factors = arena->take<T>(kBlockKeys * RowTile<T>::max_lanes);
    scratch.score = ScoreScratch<T>(p, arena);
    return scratch;
  }
};

template <class E>
void start_tile(const HeadRows& r, ForwardTile<E>& tile) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  const AttentionParams& p = r.p;
  char* row[RowTile<T>::max_lanes];
  tile.tensor_rows(r, p.q, row);
  load_factors<E>(p.q.dtype, row, tile.rows, tile.lanes, p.q.step(), p.head_dim, Scale<E>(p.scale).of_q, tile.q);
  memset(tile.out, 0, sizeof(T) * tile.lanes * p.value_dim);
  for (int i = 0; i < tile.lanes; i += S::width) {
    S::store(tile.m + i, S::set1(-kInfinity<T>));
    S::store(tile.l + i, S::zero());
  }
}

// weights[j * lanes + lane] = weight(j, v) for n keys, 0 beside the steps, in place of the scores that `weight` is made of;
// of pairs, two keys an element. Behind them zeros, as far as a matrix unit reads.
template <class E, int NV, class T, class Weight>
ATTN_INLINE void put_weights(T* scores, int64_t n, const Staircase<T>& steps, const Weight& weight) {
  using S = Simd<T>;
  constexpr int W = S::width, lanes = NV * W;
  const auto met = [&](auto first_vector, auto count, int64_t begin, int64_t end) ATTN_INLINED {
    constexpr int first = decltype(first_vector)::value, last = first + decltype(count)::value;
    if constexpr (kOfPairs<E>) {
      keeping_awake<E, 64>(begin, end, [&](int64_t from, int64_t to) ATTN_INLINED {
        for (int64_t j = from; j < to; j += 2)
          for (int v = first; v < last; ++v) {
            const Vec<T> one = weight(j, v), other = j + 1 < to ? weight(j + 1, v) : S::zero();
            S::store(scores + j / 2 * lanes + v * W, Product<E>::pairs(one, other));
          }
      });
    } else {
#pragma GCC unroll 2
      for (int64_t j = begin; j < end; ++j)
        for (int v = first; v < last; ++v) S::store(scores + j * lanes + v * W, weight(j, v));
    }
  };
  by_vectors<NV>(steps, n, met, [=](int v, int64_t begin, int64_t end) {
    for (int64_t j = elements<E>(begin); j < elements<E>(end); ++j)
      S::store(scores + j * lanes + v * W, S::zero());
  });
  if (kOfTiles<E>) memset(scores + elements<E>(n) * lanes, 0, sizeof(T) * (padded_elements<E>(n) - elements<E>(n)) * lanes);
}

// One tile meets the keys k0 .. k1 of a block.
template <class E, int NV>
__attribute__((noinline)) void forward_block(const HeadRows& r, ForwardTile<E>& tile, const KeyRows<E>& keys,
                                             KeyPairs<E>& values, int64_t k0, int64_t k1, NextTask& next,
                                             const RowLanesScratch<E>& scratch) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  constexpr int W = S::width, lanes = NV * W;
  const AttentionParams& p = r.p;
  const int64_t n = k1 - k0;
  T* const s = scratch.scores;
  next.step();
  Vec<T> m_old[NV];
  Highest<T, NV> highest;
  for (int v = 0; v < NV; ++v) m_old[v] = highest.of[v] = S::load(tile.m + v * W);
  const Staircase<T> steps(tile, k0, n);
  const Visibility seen = score_block<E, NV>(r, tile, tile.q, lanes, keys, k0, n, steps, scratch.score, s, lanes,
                                             static_cast<T*>(nullptr), highest, next);
  if (seen == Visibility::kNothing) return;
  const bool masked = seen == Visibility::kSome;

  // A sum per block: one chain of additions over all keys would lose digits with their number.
  Vec<T> base[NV], correction[NV], sum[NV];
  for (int v = 0; v < NV; ++v) {
    base[v] = softmax_base<T>(highest.of[v]);
    correction[v] = exp<T>(m_old[v] - base[v]);
    sum[v] = S::zero();
  }
  const auto probability = [&](int64_t j, int v) ATTN_INLINED {
    const Vec<T> e = exp<E>(S::load(s + j * lanes + v * W) - base[v]);
    sum[v] += e;
    return e;
  };
  if (p.dropout_rate > 0) {  // not in the sum: dropout acts on the normalised probabilities
    dropout_factors<T>(Dropout(p, r.batch), tile.position, tile.head, lanes, k0, n, scratch.factors);
    put_weights<E, NV>(s, n, steps, [&](int64_t j, int v) ATTN_INLINED {
      return probability(j, v) * S::load(scratch.factors + j * lanes + v * W);
    });
  } else {
    put_weights<E, NV>(s, n, steps, probability);
  }
  for (int v = 0; v < NV; ++v) {
    S::store(tile.m + v * W, highest.of[v]);
    S::store(tile.l + v * W, S::fma(S::load(tile.l + v * W), correction[v], sum[v]));
  }

  T* const out = tile.out;
  const auto accumulate = [=](int64_t d, int v, Vec<T> x) ATTN_INLINED {
    T* const at = out + d * lanes + v * W;
    S::store(at, S::fma(S::load(at), correction[v], x));
  };
  const E* const weights = reinterpret_cast<const E*>(s);
  if ((masked || sums_beyond<E>(n)) && !values.finite())
    gemm_hiding<E, NV, kOverKeys<E>, ZeroHides::kB>(p.value_dim, values.at(k0), values.ld(), weights, lanes,
                                                     elements<E>(n), accumulate);
  else gemm_over_keys<E, NV>(p.value_dim, values.at(k0), values.ld(), weights, lanes, n, steps, accumulate, [&] { next.ask(); });
}

// finish_row() for all rows of a tile.
template <class E>
void finish_tile(const HeadRows& r, ForwardTile<E>& tile) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  const AttentionParams& p = r.p;
  T inverse[RowTile<T>::max_lanes];
  if (p.sinks) {
    for (int i = 0; i < tile.lanes; ++i) {
      const T correction = join_sink(p, tile.head[i], &tile.m[i], &tile.l[i]);
      inverse[i] = tile.l[i] == 0 ? T{0} : correction / tile.l[i];
    }
  } else {
    for (int i = 0; i < tile.lanes; i += S::width) {
      const Vec<T> l = S::load(tile.l + i);
      S::store(inverse + i, S::select(l == S::zero(), S::zero(), S::set1(1) / l));
    }
  }
  char* row[RowTile<T>::max_lanes];
  tile.tensor_rows(r, p.out, row);
  store_transposed<T>(p.out.dtype, row, tile.rows, tile.lanes, p.out.step(), p.value_dim, tile.out,
                      tile.lanes, [&](const T* at, int lane) { return S::load(at) * S::load(inverse + lane); });
  T lse[RowTile<T>::max_lanes];
  for (int i = 0; i < tile.lanes; i += S::width) S::store(lse + i, lse_of<T>(S::load(tile.m + i), S::load(tile.l + i)));
  for (int i = 0; i < tile.rows; ++i) store_statistics(r, tile.position[i], tile.head[i], tile.m[i], tile.l[i], lse[i]);
}

// A key split leaves m, l and the unnormalised o of its rows: [row][value_dim + 2].
template <class E, class T>
void finish_partial(const HeadRows& r, const ForwardTile<E>& tile, T* partial) {
  using S = Simd<T>;
  const int64_t size = r.p.value_dim + 2;
  char* row[RowTile<T>::max_lanes];
  for (int i = 0; i < tile.rows; ++i) {
    T* const at = partial + (tile.first + i) * size;
    at[0] = tile.m[i];
    at[1] = tile.l[i];
    row[i] = reinterpret_cast<char*>(at + 2);
  }
  store_transposed<T>(kDTypeOf<T>, row, tile.rows, tile.lanes, sizeof(T),
                      r.p.value_dim, tile.out, tile.lanes, [](const T* at, int) { return S::load(at); });
}

// `count` tiles from `first` on meet all their keys, block by block.
template <class E, class T>
void forward_tiles(const HeadRows& r, const Tiling<T>& tiling, const RowLanesTask& task, int64_t first, int64_t count,
                   KeyRows<E>& keys, KeyPairs<E>& values, NextTask& next, RowLanesScratch<E>& scratch) {
  int64_t begin = r.length_k, end = 0;
  for (int64_t t = 0; t < count; ++t) {
    ForwardTile<E>& tile = scratch.tiles[t];
    tile.setup(r, tiling, first + t);
    start_tile<E>(r, tile);
    if (tile.begin >= tile.end) continue;
    if (tile.begin < begin) begin = tile.begin;
    if (tile.end > end) end = tile.end;
  }
  if (begin < task.key_begin) begin = task.key_begin;
  if (end > task.key_end) end = task.key_end;

  for_each_block(scratch.tiles, count, begin, end, r.length_k, keys, values,
                 [&](ForwardTile<E>& tile, int64_t k0, int64_t k1) {
                   with_vectors(tile.nv, [&](auto nv) {
                     forward_block<E, decltype(nv)::value>(r, tile, keys, values, k0, k1, next, scratch);
                   });
                 });
  for (int64_t t = 0; t < count; ++t) {
    if (task.partial) finish_partial<E>(r, scratch.tiles[t], static_cast<T*>(task.partial));
    else finish_tile<E>(r, scratch.tiles[t]);
  }
}

template <class E>
void forward_row_lanes(const AttentionParams& p, const RowLanesTask& task, void* memory) {
  using T = Accumulator<E>;
  [[maybe_unused]] const typename MatrixUnit<E>::Session session;
  const HeadRows r(p, task.batch, task.kv_head);
  Arena arena(memory);
  const Tiling<T> tiling(r.count);
  RowLanesScratch<E>& scratch = RowLanesScratch<E>::in(p, &arena);
  const Passes passes{task.tile_end - task.tile_begin, kForwardTiles,
                      most_keys_seen<T>(r, tiling, task.tile_begin, task.tile_end, kForwardTiles)};
  KeyRows<E> keys(r, p.k, p.k_scales, p.head_dim, passes, &arena);
  KeyPairs<E> values(r, p.v, p.v_scales, p.value_dim, passes, &arena);
  NextTask next(p, task.next_head, meetings<T>(r, tiling, task.tile_begin, task.tile_end),
                full_tiles<E>(keys_of_block(p)) + full_tiles<E>(p.value_dim));
  next.reads_inputs();
  next.reads_rows(p.out, p.value_dim);
  for (int64_t first = task.tile_begin; first < task.tile_end; first += kForwardTiles) {
    const int64_t left = task.tile_end - first;
    forward_tiles<E>(r, tiling, task, first, left < kForwardTiles ? left : kForwardTiles, keys, values, next, scratch);
  }
}

// Merges the splits of one row:  m = max m_s,  w_s = e^(m_s - m),  l = sum w_s l_s,  out = sum w_s o_s / l.
template <class T>
void combine(const AttentionParams& p, const CombineTask& task) {
  const HeadRows r(p, task.batch, task.kv_head);
  const int64_t size = p.value_dim + 2, split_size = task.split_bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t row = 0; row < r.count; ++row) {
    T* const first = static_cast<T*>(task.partials) + row * size;
    T m = -kInfinity<T>, l = 0;
    for (int64_t s = 0; s < task.splits; ++s) {
      const T m_s = first[s * split_size];
      if (m_s > m || m_s != m_s) m = m_s;
    }
    const T base = softmax_base<T>(Simd<T>::set1(m))[0];
    for (int64_t s = 0; s < task.splits; ++s) {
      T* const part = first + s * split_size;
      const T weight = exp_of(part[0] - base);
      l += weight * part[1];
      for (int64_t d = 0; d < p.value_dim; ++d)  // into the first split's row
        first[2 + d] = s == 0 ? weight * part[2 + d] : first[2 + d] + weight * part[2 + d];
    }
    finish_row<T>(r, r.position(row), r.head(row), m, l, first + 2);
  }
}

}  // namespace
}  // namespace attn_ops::cpu
