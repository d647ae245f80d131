// Forward: out = softmax(scores, masked) v, one pass over the keys, transposed. What happens to a score is in scores.h.
//
// For a tile of rows (one per vector lane) and a block of keys:
//   s[j][i]  = sum_d k[j][d] q'[d][i]             q' = scale q, packed once per tile
//   m'       = max(m, max_j s)                    c = e^(m - m')
//   p[j][i]  = e^(s - m')                         l = c l + sum_j p
//   o[d][i]  = c o + sum_j v[j][d] p[j][i]
// and at the end out = o / l, lse = m + ln l. Maxima, sums and corrections are plain vectors: nothing is
// ever reduced across lanes.
#pragma once

#include "kernels.h"
#include "row_tile.h"
#include "rows_ahead.h"
#include "scores.h"

namespace attn_ops::cpu {
namespace {

template <class T>
struct ForwardTile : RowTile<T> {
  T *q, *out;  // [head_dim][ld], [value_dim][ld]
  int64_t ld;  // the lanes, but for a part of a tile those of the whole
  T m[RowTile<T>::max_lanes], l[RowTile<T>::max_lanes];
};

template <class T>
struct RowLanesScratch {
  ForwardTile<T> tiles[kForwardTiles], part;
  T *scores, *factors;
  ScoreScratch<T> score;

  static int64_t bytes(const AttentionParams& p) {
    return Arena::bytes<RowLanesScratch>(1) + KeyRows<T>::bytes(p, p.head_dim) + KeyRows<T>::bytes(p, p.value_dim) +
           kForwardTiles * (Arena::bytes<T>(RowTile<T>::max_lanes * p.head_dim) +
                            Arena::bytes<T>(RowTile<T>::max_lanes * p.value_dim)) +
           2 * Arena::bytes<T>(kBlockKeys * RowTile<T>::max_lanes) + ScoreScratch<T>::bytes(p);
  }

  static RowLanesScratch& in(const AttentionParams& p, Arena* arena) {
    RowLanesScratch& scratch = *arena->take<RowLanesScratch>(1);
    for (ForwardTile<T>& tile : scratch.tiles) {
      tile.q = arena->take<T>(RowTile<T>::max_lanes * p.head_dim);
      tile.out = arena->take<T>(RowTile<T>::max_lanes * p.value_dim);
    }
    scratch.scores = arena->take<T>(kBlockKeys * RowTile<T>::max_lanes);
    scratch.factors = arena->take<T>(kBlockKeys * RowTile<T>::max_lanes);
    scratch.score = ScoreScratch<T>(p, arena);
    return scratch;
  }
};

template <class T>
void start_tile(const HeadRows& r, ForwardTile<T>& tile) {
  using S = Simd<T>;
  const AttentionParams& p = r.p;
  char* row[RowTile<T>::max_lanes];
  tile.tensor_rows(r, p.q, row);
  tile.ld = tile.lanes;
  const Vec<T> factor = S::set1(static_cast<T>(p.scale));
  load_transposed<T>(p.q.dtype, row, tile.rows, tile.lanes, p.q.step(), p.head_dim, tile.q, tile.lanes,
                     [=](T* at, Vec<T> x) { S::store(at, x * factor); });
  memset(tile.out, 0, sizeof(T) * tile.lanes * p.value_dim);
  for (int i = 0; i < tile.lanes; i += S::width) {
    S::store(tile.m + i, S::set1(-kInfinity<T>));
    S::store(tile.l + i, S::zero());
  }
}

// One tile meets the keys k0 .. k1 of a block.
template <class T, int NV>
__attribute__((noinline)) void forward_block(const HeadRows& r, ForwardTile<T>& tile, const KeyRows<T>& keys,
                                             KeyRows<T>& values, int64_t k0, int64_t k1,
                                             const RowLanesScratch<T>& scratch) {
  using S = Simd<T>;
  constexpr int W = S::width, lanes = NV * W;
  const AttentionParams& p = r.p;
  const int64_t n = k1 - k0;
  T* const s = scratch.scores;
  Vec<T> m_old[NV], m[NV];
  for (int v = 0; v < NV; ++v) m_old[v] = m[v] = S::load(tile.m + v * W);
  const Visibility seen = score_block<T, NV>(r, tile, tile.q, tile.ld, keys, k0, n, scratch.score, s, lanes, nullptr,
                                             [&m](int v, Vec<T> x) { m[v] = S::max(m[v], x); });
  if (seen == Visibility::kNothing) return;
  const bool masked = seen == Visibility::kSome;

  // A sum per block: one chain of additions over all keys would lose digits with their number.
  Vec<T> base[NV], correction[NV], sum[NV];
  for (int v = 0; v < NV; ++v) {
    base[v] = softmax_base<T>(m[v]);
    correction[v] = exp<T>(m_old[v] - base[v]);
    sum[v] = S::zero();
  }
#pragma GCC unroll 2
  for (int64_t j = 0; j < n; ++j)
    for (int v = 0; v < NV; ++v) {
      const Vec<T> e = exp<T>(S::load(s + j * lanes + v * W) - base[v]);
      sum[v] += e;
      S::store(s + j * lanes + v * W, e);
    }
  for (int v = 0; v < NV; ++v) {
    S::store(tile.m + v * W, m[v]);
    S::store(tile.l + v * W, S::fma(S::load(tile.l + v * W), correction[v], sum[v]));
  }
  if (p.dropout_rate > 0) {  // after the sum: dropout acts on the normalised probabilities
    dropout_factors<T>(Dropout(p, r.batch), tile.position, tile.head, lanes, k0, n, scratch.factors);
    for (int64_t i = 0; i < n * lanes; i += W) S::store(s + i, S::load(s + i) * S::load(scratch.factors + i));
  }

  T* const out = tile.out;
  const int64_t ld = tile.ld;
  const auto accumulate = [=](int64_t d, int v, Vec<T> x) {
    T* const at = out + d * ld + v * W;
    S::store(at, S::fma(S::load(at), correction[v], x));
  };
  if (masked && !values.finite())
    gemm_hiding<T, NV, Major::kDepth, ZeroHides::kB>(p.value_dim, values.at(k0), values.ld(), s, lanes, n, accumulate);
  else gemm<T, NV, Major::kDepth>(p.value_dim, values.at(k0), values.ld(), s, lanes, n, accumulate);
}

// `count` vectors of a tile from `first` on as a tile of their own, in place: q and out are shared, m and l copied.
template <class T>
void part_of_tile(const ForwardTile<T>& tile, int first, int count, ForwardTile<T>& part) {
  const int skipped = first * Simd<T>::width;
  part.nv = count;
  part.lanes = count * Simd<T>::width;
  part.rows = tile.rows - skipped < part.lanes ? tile.rows - skipped : part.lanes;
  part.first = tile.first + skipped;
  part.all_begin = 0, part.all_end = INT64_MAX;
  for (int i = 0; i < part.lanes; ++i) {
    part.lo[i] = tile.lo[i + skipped], part.hi[i] = tile.hi[i + skipped];
    part.position[i] = tile.position[i + skipped], part.head[i] = tile.head[i + skipped];
    part.m[i] = tile.m[i + skipped], part.l[i] = tile.l[i + skipped];
    if (i >= part.rows) continue;
    if (part.lo[i] > part.all_begin) part.all_begin = part.lo[i];
    if (part.hi[i] < part.all_end) part.all_end = part.hi[i];
  }
  part.begin = part.lo[0];
  part.end = part.hi[part.rows - 1];
  part.q = tile.q + skipped;
  part.out = tile.out + skipped;
  part.ld = tile.ld;
}

// A tile meets the keys k0 .. k1 of a block, cut where intervals begin and end, so that only vectors that see keys take
// part: of 48 rows on a causal diagonal and as many keys past the first, a third of the products is nobody's, of rows
// of two documents half. Key 4 n starts a group of random numbers: cuts are there.
template <class T>
void forward_tile_block(const HeadRows& r, ForwardTile<T>& tile, const KeyRows<T>& keys, KeyRows<T>& values, int64_t k0,
                        int64_t k1, RowLanesScratch<T>& scratch) {
  constexpr int W = Simd<T>::width;
  const auto begin_of = [&](int v) { return tile.lo[v * W] / 4 * 4; };
  const auto end_of = [&](int v) {
    const int last = (v + 1) * W <= tile.rows ? (v + 1) * W - 1 : tile.rows - 1;
    return (tile.hi[last] + 3) / 4 * 4;
  };
  const auto meet = [&](ForwardTile<T>& t, int64_t begin, int64_t end) {
    with_vectors(t.nv,
                 [&](auto nv) { forward_block<T, decltype(nv)::value>(r, t, keys, values, begin, end, scratch); });
  };
  int first = 0;
  while (k0 < k1) {
    while (first < tile.nv && end_of(first) <= k0) ++first;  // neither end ever moves back
    if (first == tile.nv) return;
    // A cut costs a visit to the output: none is made for the few keys between the rows of a window.
    int count = 0;
    while (first + count < tile.nv && begin_of(first + count) < k0 + kLeastCut) ++count;
    const int next = first + count;
    const int64_t cut = next < tile.nv ? begin_of(next) : k1;
    // Rows from `next` on that begin at the last key or past it see none, and are not waited for.
    int64_t end = cut < k1 && tile.lo[next * W] < tile.end ? cut : k1;
    if (count > 0 && first + 1 < tile.nv && end_of(first) < end) end = end_of(first);
    if (count == tile.nv) {
      meet(tile, k0, end);
    } else if (count > 0) {
      ForwardTile<T>& part = scratch.part;
      part_of_tile(tile, first, count, part);
      meet(part, k0, end);
      memcpy(tile.m + first * W, part.m, sizeof(T) * part.lanes);
      memcpy(tile.l + first * W, part.l, sizeof(T) * part.lanes);
    }
    k0 = end;
  }
}

// finish_row() for all rows of a tile.
template <class T>
void finish_tile(const HeadRows& r, ForwardTile<T>& tile) {
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
  for (int i = 0; i < tile.rows; ++i) store_statistics(r, tile.position[i], tile.head[i], tile.m[i], tile.l[i]);
}

// A key split leaves m, l and the unnormalised o of its rows: [row][value_dim + 2].
template <class T>
void finish_partial(const HeadRows& r, const ForwardTile<T>& tile, T* partial) {
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
template <class T>
void forward_tiles(const HeadRows& r, const Tiling<T>& tiling, const RowLanesTask& task, int64_t first, int64_t count,
                   KeyRows<T>& keys, KeyRows<T>& values, NextTask& next, RowLanesScratch<T>& scratch) {
  int64_t begin = r.length_k, end = 0;
  for (int64_t t = 0; t < count; ++t) {
    ForwardTile<T>& tile = scratch.tiles[t];
    tile.setup(r, tiling, first + t);
    start_tile<T>(r, tile);
    if (tile.begin >= tile.end) continue;
    if (tile.begin < begin) begin = tile.begin;
    if (tile.end > end) end = tile.end;
  }
  if (begin < task.key_begin) begin = task.key_begin;
  if (end > task.key_end) end = task.key_end;

  for_each_block<T>(scratch.tiles, count, begin, end, keys, values, [&](ForwardTile<T>& tile, int64_t k0, int64_t k1) {
    next.ask();
    forward_tile_block<T>(r, tile, keys, values, k0, k1, scratch);
  });
  for (int64_t t = 0; t < count; ++t) {
    if (task.partial) finish_partial<T>(r, scratch.tiles[t], static_cast<T*>(task.partial));
    else finish_tile<T>(r, scratch.tiles[t]);
  }
}

template <class T>
void forward_row_lanes(const AttentionParams& p, const RowLanesTask& task, void* memory) {
  const HeadRows r(p, task.batch, task.kv_head);
  Arena arena(memory);
  const Tiling<T> tiling(r.count);
  RowLanesScratch<T>& scratch = RowLanesScratch<T>::in(p, &arena);
  const bool shared = task.tile_end - task.tile_begin > 1;
  const int64_t together = most_keys_seen<T>(r, tiling, task.tile_begin, task.tile_end, kForwardTiles);
  KeyRows<T> keys(r, p.k, p.k_scales, p.head_dim, shared, together, &arena);
  KeyRows<T> values(r, p.v, p.v_scales, p.value_dim, shared, together, &arena);
  NextTask next(p, task.next_head, task.tile_end - task.tile_begin);
  next.reads_inputs();
  next.reads_rows(p.out, p.value_dim);
  for (int64_t first = task.tile_begin; first < task.tile_end; first += kForwardTiles) {
    const int64_t left = task.tile_end - first;
    forward_tiles<T>(r, tiling, task, first, left < kForwardTiles ? left : kForwardTiles, keys, values, next, scratch);
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
