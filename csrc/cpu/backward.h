// Backward: dq, dk, dv from d_out, with the probabilities recomputed block by block, transposed like forward.
//
//   p  = e^(s - m) / l                    s recomputed exactly as forward computed it
//   dp[j][i] = sum_d v[j][d] d_out[d][i]
//   ds = p (dp - delta)                   delta[i] = sum_d d_out out - d_lse = sum_j p dp - d_lse
//   dv[j] += sum_i p[j][i] d_out[i]       dk[j] += scale sum_i ds[j][i] q[i]       dq[i] = scale sum_j ds[j][i] k[j]
// With dropout factors f (0 or 1 / (1 - rate)): p f in dv, dp f in ds. What happens to a score in between, and its
// gradients: scores.h, term_gradients.h.
//
// m and l of a row are what forward left in `statistics`, and delta is the first of its two sums, unless what forward
// left will not do (recomputes_statistics): then a pass over the keys finds all three first.
//
// A task owns a chunk of rows: its dq is final, its dk, dv are partial sums over its rows that reduce() adds up in
// chunk order. So there are no atomics, and the bits do not depend on who ran what.
#pragma once

#include "bias_gradient.h"
#include "kernels.h"
#include "recompute_statistics.h"
#include "rows_ahead.h"
#include "scores.h"
#include "term_gradients.h"

namespace attn_ops::cpu {
namespace {

// p (with dropout) and ds of one tile against keys k0 .. k1, into [key][ld]; zeros where nothing is seen. `next` and `d_bias`
// are asked for between products.
template <class E, int NV, class T, class RowOf>
__attribute__((noinline)) Visibility score_gradients(const HeadRows& r, const BackwardTile<E>& tile,
                                                     const KeyRows<E>& keys, const KeyRows<E>& values, int64_t k0,
                                                     int64_t k1, const Staircase<T>& steps,
                                                     const BackwardScratch<E>& scratch, T* prob, T* ds, int64_t ld,
                                                     NextTask& next, LaneRowsAhead<RowOf>& d_bias) {
  using S = Simd<T>;
  constexpr int W = S::width, lanes = NV * W;
  const AttentionParams& p = r.p;
  const int64_t n = k1 - k0;
  const bool kept = tile.kept.s != nullptr;
  Untold untold;
  const Visibility seen = kept ? tile.kept.seen_of(k0)
                               : score_block<E, NV>(r, tile, tile.q, lanes, keys, k0, n, steps, scratch.score, prob, ld,
                                                    scratch.cap_slopes, untold, next);
  if (seen == Visibility::kNothing) {
    no_weights<T, NV>(n, prob, ds, ld);
    return seen;
  }
  const bool masked = seen == Visibility::kSome;
  if (!kept)
    gemm_of_steps<E, NV>(values.at(k0), values.ld(), tile.d_out, lanes, padded_elements<E>(p.value_dim), steps, ds, ld,
                         [](Vec<T> x) { return x; }, [&] {
                           d_bias.ask();
                           next.ask();
                         });
  const T* const s_from = kept ? tile.kept.s + (k0 - tile.kept.first) * lanes : prob;
  const T* const dp_from = kept ? tile.kept.dp + (k0 - tile.kept.first) * lanes : ds;
  const int64_t from_ld = kept ? lanes : ld;
  const bool dropout = p.dropout_rate > 0;
  if (dropout) dropout_factors<T>(Dropout(p, r.batch), tile.position, tile.head, lanes, k0, n, scratch.factors);

  Vec<T> m[NV], inverse_l[NV], delta[NV];
  typename S::I nobody[NV];  // lanes not in use, which no mask hides, and rows without keys
  for (int v = 0; v < NV; ++v) {
    m[v] = S::load(tile.m + v * W);
    inverse_l[v] = S::load(tile.inverse_l + v * W);
    delta[v] = S::load(tile.delta + v * W);
    nobody[v] = inverse_l[v] == S::zero();
  }
  const auto elementwise = [&](auto may_hide, auto may_drop) {
    const auto met = [&](auto first, auto count, int64_t begin, int64_t end) ATTN_INLINED {
      keeping_awake<E, 32>(begin, end, [&](int64_t from, int64_t to) ATTN_INLINED {
        for (int64_t j = from; j < to; ++j)
          for (int v = decltype(first)::value; v < decltype(first)::value + decltype(count)::value; ++v) {
            T *const p_at = prob + j * ld + v * W, *const ds_at = ds + j * ld + v * W;
            const Vec<T> s = S::load(s_from + j * from_ld + v * W);
            // No score exceeds its maximum; whoever brings the statistics of other scores gets at most a wrong gradient.
            const Vec<T> e = exp<E>(S::min(S::zero(), s - m[v])) * inverse_l[v];
            Vec<T> dp = S::load(dp_from + j * from_ld + v * W), weight = e;
            if (decltype(may_drop)::value) {
              const Vec<T> f = S::load(scratch.factors + j * lanes + v * W);
              dp *= f;
              weight = e * f;
            }
            Vec<T> g = e * (dp - delta[v]);
            if (decltype(may_hide)::value) {
              const typename S::I hidden = (s == S::set1(-kInfinity<T>)) | nobody[v];
              g = S::select(hidden, S::zero(), g);
              weight = S::select(hidden, S::zero(), weight);
            }
            S::store(p_at, weight);
            S::store(ds_at, g);
          }
      });
    };
    by_vectors<NV>(steps, n, met, [=](int v, int64_t begin, int64_t end) {
      no_weights<T, 1>(end - begin, prob + begin * ld + v * W, ds + begin * ld + v * W, ld);
    });
  };
  if (masked && dropout) elementwise(std::true_type{}, std::true_type{});
  else if (masked) elementwise(std::true_type{}, std::false_type{});
  else if (dropout) elementwise(std::false_type{}, std::true_type{});
  else elementwise(std::false_type{}, std::false_type{});
  return seen;
}

// dq += k ds, of one tile and the keys begin .. end.
template <class E, int NV>
__attribute__((noinline)) void add_query_gradient(const BackwardTile<E>& tile, KeyPairs<E>& keys, int64_t begin,
                                                  int64_t end, const Staircase<Accumulator<E>>& steps, const E* ds,
                                                  int64_t ld, int64_t head_dim, bool masked) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  T* const dq = tile.dq;
  const auto add = [=](int64_t d, int v, Vec<T> x) {
    T* const at = dq + d * (NV * S::width) + v * S::width;
    S::store(at, S::load(at) + x);
  };
  const int64_t n = end - begin;
  if ((masked || sums_beyond<E>(n)) && !keys.finite())
    gemm_hiding<E, NV, kOverKeys<E>, ZeroHides::kB>(head_dim, keys.at(begin), keys.ld(), ds, ld, elements<E>(n), add);
  else gemm_over_keys<E, NV>(head_dim, keys.at(begin), keys.ld(), ds, ld, n, steps, add);
}

// meet(j, keys, from, to) for neighbouring keys k0 + j .. k0 + j + keys of the n and the lanes, of first_lane .. end_lane of the
// joint tiles, that may see them, as far as intervals say.
template <class E, class Meet>
void with_lanes_of_keys(const BackwardTile<E>* t0, const BackwardTile<E>* t1, int64_t k0, int64_t n, int64_t first_lane,
                        int64_t end_lane, const Meet& meet) {
  bool all = true;
  for (const BackwardTile<E>* t = t0; t < t1; ++t) all = all && t->all_see(k0, k0 + n);
  if (all) return meet(0, n, first_lane, end_lane);
  constexpr int64_t kKeys = 16, kLanes = kOfTiles<E> ? kTileNumbers<E> : 8;  // less is no work worth a product of its own
  int64_t from = first_lane, to = first_lane;
  const auto skip = [&](int64_t* lane, const auto& passes) {  // to the first that does not pass; ends never move back
    int64_t start = 0;
    for (const BackwardTile<E>* t = t0; t < t1; start += t->lanes, ++t) {
      for (; *lane < end_lane && *lane < start + t->lanes; ++*lane)
        if (!passes(*t, *lane - start)) return;
    }
  };
  int64_t begin = 0, seen_from = 0, seen_to = 0;
  const auto flush = [&](int64_t j) {
    if (seen_from < seen_to) meet(begin, j - begin, seen_from, seen_to < end_lane ? seen_to : end_lane);
  };
  for (int64_t j = 0; j < n; j += kKeys) {
    skip(&from, [&](const BackwardTile<E>& t, int64_t i) { return i < t.rows && t.hi[i] <= k0 + j; });
    skip(&to, [&](const BackwardTile<E>& t, int64_t i) { return i >= t.rows || t.lo[i] < k0 + j + kKeys; });
    const int64_t down = from / kLanes * kLanes, up = (to + kLanes - 1) / kLanes * kLanes;
    if (down == seen_from && up == seen_to) continue;
    flush(j);
    begin = j, seen_from = down, seen_to = up;
  }
  flush(n);
}

// Joint tiles [t0, t1) of the scratch against keys k0 .. k1.
template <class E>
void backward_block(const BackwardParams& params, const HeadRows& r, BackwardTile<E>* t0, BackwardTile<E>* t1,
                    BackwardKeys<E>& keys, int64_t k0, int64_t k1, NextTask& next, const BackwardScratch<E>& scratch,
                    const BackwardTask& task, BiasGradient kind) {
  using T = Accumulator<E>;
  T *const dk = static_cast<T*>(task.dk), *const dv = static_cast<T*>(task.dv);
  const AttentionParams& p = r.p;
  const int64_t n = k1 - k0, padded_d = round_to_width<T>(p.head_dim), padded_dv = round_to_width<T>(p.value_dim);
  int64_t ld = 0, first_lane = 0, end_lane = 0;  // lanes of the tiles that see something
  bool masked = false, q_finite = true, d_out_finite = true;
  for (BackwardTile<E>* t = t0; t < t1; ++t) ld += t->lanes;
  const bool asks = (kind == BiasGradient::kOwn || kind == BiasGradient::kElements) && bias_leaves_caches(p);
  const int64_t d_bias_size = kind == BiasGradient::kOwn ? size_of(p.bias.dtype) : static_cast<int64_t>(sizeof(T));

  int64_t lane = 0;
  for (BackwardTile<E>* t = t0; t < t1; lane += t->lanes, ++t) {
    with_vectors(t->nv, [&](auto nv) {
      constexpr int NV = decltype(nv)::value;
      T *const prob = scratch.p + lane, *const ds = scratch.ds + lane;
      // The tiles meet the block together, but each computes only what it sees of it.
      const int64_t tile_end = end_of_keys<E>(t->end, r.length_k);
      int64_t begin = start_of_group<E>(t->begin) > k0 ? start_of_group<E>(t->begin) : k0, end = tile_end < k1 ? tile_end : k1;
      if (begin >= end || t->begin >= t->end) begin = end = k1;
      T* const seen_ds = ds + (begin - k0) * ld;
      no_weights<T, NV>(begin - k0, prob, ds, ld);
      no_weights<T, NV>(k1 - end, prob + (end - k0) * ld, ds + (end - k0) * ld, ld);
      const Staircase<T> steps(*t, begin, end - begin);
      LaneRowsAhead d_bias(asks ? t->rows : 0, n * d_bias_size, [&](int lane) {
        return kind == BiasGradient::kOwn
                   ? bias_gradient_row(params, r, t->position[lane], t->head[lane]) + k0 * d_bias_size
                   : reinterpret_cast<const char*>(sum_row<T>(task.d_bias, *t, lane, p.seqlen_k) + k0);
      });
      next.step();
      const Visibility what = begin == end
                                  ? Visibility::kNothing
                                  : score_gradients<E, NV>(r, *t, keys.keys, keys.values, begin, end, steps, scratch,
                                                           prob + (begin - k0) * ld, seen_ds, ld, next, d_bias);
      if (kind == BiasGradient::kOwn) write_bias_gradient<T>(params, r, *t, k0, n, ds, ld);
      if (kind == BiasGradient::kElements && (task.d_bias.starts || what != Visibility::kNothing))
        add_elements<T>(task.d_bias, *t, k0, n, p.seqlen_k, ds, ld);
      masked = masked || what != Visibility::kAll || end - begin < n;
      const auto pack = [&] {
        if constexpr (kOfPairs<E>) pack_weights<E, NV>(n, lane, scratch.p, scratch.ds, ld, scratch.of_query);
      };
      if (what == Visibility::kNothing) {
        if (t1 - t0 > 1) pack();  // zeros beside what joint tiles see
        return;
      }
      if (end_lane == 0) first_lane = lane;
      end_lane = lane + t->lanes;
      if (kind > BiasGradient::kElements)
        add_block_sums<T, NV>(kind, static_cast<double*>(task.d_bias.sums), *t, begin, end - begin, seen_ds, ld);
      if (task.d_relative_bias)
        add_relative_gradient<T, NV>(r, *t, begin, end - begin, seen_ds, ld, task.d_relative_bias);
      if (p.soft_cap != 0) through_cap<T, NV>(scratch.cap_slopes, end - begin, seen_ds, ld);
      const auto add_to_query = [&](const E* weights, int64_t weights_ld) {
        add_query_gradient<E, NV>(*t, keys.key_pairs, begin, end, steps, weights, weights_ld, p.head_dim,
                                  what == Visibility::kSome);
      };
      if constexpr (kOfPairs<E>) {
        pack();
        const int64_t first = (begin - k0) / 2 * t->lanes;
        add_to_query(scratch.of_query.rounded + first, t->lanes);
        add_to_query(scratch.of_query.rest + first, t->lanes);
      } else {
        add_to_query(seen_ds, ld);
      }
    });
    q_finite = q_finite && t->q_finite;
    d_out_finite = d_out_finite && t->d_out_finite;
  }
  if (end_lane == 0) return;
  if constexpr (kOfTiles<E>) zeros_behind<E>(n, ld, scratch.p, scratch.ds);
  with_lanes_of_keys<E>(t0, t1, k0, n, first_lane, end_lane, [&](int64_t j, int64_t keys, int64_t from, int64_t to) {
    const int64_t first = elements<E>(from), depth = elements<E>(to - from);
    const E *const prob = reinterpret_cast<const E*>(scratch.p) + j * ld + first;
    const E *const ds = reinterpret_cast<const E*>(scratch.ds) + j * ld + first;
    gemm_accumulate<E, Major::kRow>(keys, padded_dv, prob, ld, t0->d_out_rows + first * padded_dv, padded_dv, depth,
                                    masked && !d_out_finite, dv + (k0 + j) * padded_dv, padded_dv);
    gemm_accumulate<E, Major::kRow>(keys, padded_d, ds, ld, t0->q_rows + first * padded_d, padded_d, depth,
                                    masked && !q_finite, dk + (k0 + j) * padded_d, padded_d);
  });
}

// Rows of zeros behind those of the last tile, as far as a matrix unit reads.
template <class E>
void zero_rows_behind(const BackwardTile<E>& last, int64_t padded_d, int64_t padded_dv) {
  constexpr int64_t rows = MatrixUnit<E>::depth - 1;
  const int64_t used = elements<E>(last.lanes);
  if (rows == 0) return;
  memset(last.q_rows + used * padded_d, 0, sizeof(E) * rows * padded_d);
  memset(last.d_out_rows + used * padded_dv, 0, sizeof(E) * rows * padded_dv);
}

// The rows of a task in one list: dq, and what they add to the rest.
template <class E>
void backward_rows(const BackwardParams& params, const HeadRows& r, const BackwardTask& task, BiasGradient kind,
                   BackwardKeys<E>& keys, NextTask& next, const BackwardScratch<E>& scratch) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  const AttentionParams& p = params.forward;
  const Tiling<T> tiling(r.count);
  const int64_t padded_d = round_to_width<T>(p.head_dim), padded_dv = round_to_width<T>(p.value_dim);
  const int64_t kept_keys = BackwardScratch<E>::kept_keys(p);
  const bool keeps = most_keys_seen<T>(r, tiling, task.tile_begin, task.tile_end, 1) + kBlockKeys <= kept_keys;
  const int64_t together = keeps || kOfTiles<E> ? joint_tiles<E>() : kBackwardTiles;
  for (int64_t first = task.tile_begin; first < task.tile_end; first += together) {
    const int64_t count = task.tile_end - first < together ? task.tile_end - first : together;
    BackwardTile<E>* const tiles = scratch.tiles;
    int64_t begin = r.length_k, end = 0;
    for (int64_t t = 0; t < count; ++t) {
      if (t > 0) {
        const BackwardTile<E>& before = tiles[t - 1];
        tiles[t].q = before.q + before.lanes * padded_elements<E>(p.head_dim);
        tiles[t].dq = before.dq + before.lanes * p.head_dim;
        tiles[t].d_out = before.d_out + before.lanes * padded_elements<E>(p.value_dim);
        tiles[t].q_rows = before.q_rows + elements<E>(before.lanes) * padded_d;
        tiles[t].d_out_rows = before.d_out_rows + elements<E>(before.lanes) * padded_dv;
      }
      tiles[t].setup(r, tiling, first + t);
      start_tile<E>(params, r, tiles[t]);
      tiles[t].kept = keeps ? scratch.kept[t] : KeptScores<T>();
      tiles[t].kept.first = tiles[t].begin / kBlockKeys * kBlockKeys;
      if (tiles[t].begin >= tiles[t].end) continue;
      if (tiles[t].begin < begin) begin = tiles[t].begin;
      if (tiles[t].end > end) end = tiles[t].end;
    }
    zero_rows_behind<E>(tiles[count - 1], padded_d, padded_dv);
    if (recomputes_statistics<E>(p))
      recompute_statistics<E>(params, r, tiles, count, begin, end, keys.keys, keys.values, next, scratch);
    for (int64_t t = 0; task.d_sinks && t < count; ++t) add_sink_gradient<E>(params, r, tiles[t], task.d_sinks);

    const bool clears = kind == BiasGradient::kOwn || (kind == BiasGradient::kElements && task.d_bias.starts);
    for (int64_t t = 0; clears && t < count; ++t) {
      const int64_t t0 = t / joint_tiles<E>() * joint_tiles<E>(), t1 = t0 + joint_tiles<E>();
      const KeyRange met = keys_met(tiles + t0, tiles + (t1 < count ? t1 : count));
      if (kind == BiasGradient::kOwn) clear_bias_gradient<T>(params, r, tiles[t], met);
      else clear_sums<T>(task.d_bias, tiles[t], p.seqlen_k, met);
    }
    end = end_of_keys<E>(end, r.length_k);
    // Key 4 n starts a group of random numbers, or a pair; keys before `begin` are hidden from all rows. What is kept is of
    // blocks that begin so.
    const bool in_groups = kOfPairs<E> || keeps || p.dropout_rate > 0;
    for (int64_t block = begin / kBlockKeys * kBlockKeys; block < end; block += kBlockKeys) {
      const int64_t block_begin = block < begin ? begin : block;
      const int64_t block_end = block + kBlockKeys < end ? block + kBlockKeys : end;
      const int64_t load_begin = in_groups ? start_of_group<E>(block_begin) : block_begin;
      keys.load(load_begin, block_end);
      for (int64_t t = 0; t < count; t += joint_tiles<E>()) {
        const int64_t t1 = t + joint_tiles<E>() < count ? t + joint_tiles<E>() : count;
        int64_t k0 = block_end, k1 = load_begin;  // what these tiles see of the block
        for (int64_t i = t; i < t1; ++i) {
          if (tiles[i].begin >= tiles[i].end) continue;
          if (tiles[i].begin < k0) k0 = tiles[i].begin < load_begin ? load_begin : tiles[i].begin;
          const int64_t tile_end = end_of_keys<E>(tiles[i].end, r.length_k);
          if (tile_end > k1) k1 = tile_end > block_end ? block_end : tile_end;
        }
        if (in_groups) k0 = start_of_group<E>(k0);
        if (k0 >= k1) continue;
        backward_block<E>(params, r, tiles + t, tiles + t1, keys, k0, k1, next, scratch, task, kind);
      }
    }

    const Vec<T> scale = S::set1(static_cast<T>(p.scale));
    for (int64_t t = 0; t < count; ++t) {
      char* row[RowTile<T>::max_lanes];
      tiles[t].tensor_rows(r, params.dq, row);
      store_transposed<T>(params.dq.dtype, row, tiles[t].rows, tiles[t].lanes, params.dq.step(), p.head_dim,
                          tiles[t].dq, tiles[t].lanes, [=](const T* at, int) { return S::load(at) * scale; });
    }
  }
}

template <class E>
void backward(const BackwardParams& params, const BackwardTask& task, void* memory) {
  using T = Accumulator<E>;
  const AttentionParams& p = params.forward;
  const BiasGradient kind = bias_gradient_of(params);
  const int64_t group = group_size(p), joint = separate_heads(kind) ? 1 : group;  // heads of a list
  const auto list = [&](int64_t h) { return HeadRows(p, task.batch, task.kv_head, task.kv_head * group + h, joint); };
  const HeadRows first_list = list(0);
  const Tiling<T> tiling(first_list.count);
  const int64_t first_row = tiling.first_row(task.tile_begin), padded_end = tiling.first_row(task.tile_end);
  const int64_t padded_d = round_to_width<T>(p.head_dim), padded_dv = round_to_width<T>(p.value_dim);
  T *const dk = static_cast<T*>(task.dk), *const dv = static_cast<T*>(task.dv);
  const KeyRange seen = keys_seen(first_list, tiling, task.tile_begin, task.tile_end);
  if (seen.begin < seen.end) {
    memset(dk + seen.begin * padded_d, 0, sizeof(T) * (seen.end - seen.begin) * padded_d);
    memset(dv + seen.begin * padded_dv, 0, sizeof(T) * (seen.end - seen.begin) * padded_dv);
  }
  const int64_t distances = 2 * p.relative_reach + 1;
  if (task.d_relative_bias) memset(task.d_relative_bias, 0, sizeof(double) * group * distances);
  if (task.d_sinks) memset(task.d_sinks, 0, sizeof(double) * group);

  [[maybe_unused]] const typename MatrixUnit<E>::Session session;
  Arena arena(memory);
  const BackwardScratch<E> scratch(p, arena);
  const Passes passes{2 * (task.tile_end - task.tile_begin) * (group / joint), kBackwardTiles,  // for scores, and for dq
                      most_keys_seen<T>(first_list, tiling, task.tile_begin, task.tile_end, kBackwardTiles)};
  BackwardKeys<E> keys(first_list, passes, &arena);
  NextTask next(p, task.next_head, meetings<T>(first_list, tiling, task.tile_begin, task.tile_end) * (group / joint),
                2 * full_tiles<E>(keys_of_block(p)));
  next.reads_inputs();
  if (!recomputes_statistics<E>(p)) next.reads_rows(p.out, p.value_dim);
  next.reads_rows(params.d_out, p.value_dim);
  next.reads_rows(params.dq, p.head_dim);
  next.reads_keys(params.dk, p.head_dim);
  next.reads_keys(params.dv, p.value_dim);
  for (int64_t h = 0; h < group; h += joint) {
    BackwardTask of_list = task;
    if (task.d_relative_bias) of_list.d_relative_bias += h * distances;
    if (task.d_sinks) of_list.d_sinks += h;
    BiasSums& sums = of_list.d_bias;
    if (separate_heads(kind)) {
      const bool first = h == 0 || sums.stride > 0, last = h == group - 1 || sums.stride > 0;
      const int64_t size = kind == BiasGradient::kElements ? sizeof(T) : sizeof(double);
      sums.sums = static_cast<char*>(sums.sums) + h * sums.stride * size;
      if (sums.totals) sums.totals += h * sums.stride;
      sums.starts = sums.starts && first;
      sums.adds = sums.adds && last;
      start_sums(kind, sums, first_row, padded_end, p.seqlen_k);
    }
    backward_rows<E>(params, list(h), of_list, kind, keys, next, scratch);
    finish_sums<T>(sums, first_row, padded_end, p.seqlen_q, p.seqlen_k);
  }
}

// dk, dv = the sum of the chunks that saw the key, in chunk order; 0 where none did.
template <class T>
void reduce(const BackwardParams& params, const ReduceTask& task, void* memory) {
  using S = Simd<T>;
  const AttentionParams& p = params.forward;
  const int64_t group = group_size(p);
  const HeadRows r(p, task.batch, task.kv_head, task.kv_head * group,
                   separate_heads(bias_gradient_of(params)) ? 1 : group);
  const Tiling<T> tiling(r.count);
  T* const sum = static_cast<T*>(memory);
  const auto write = [&](const StridedView& view, const void* partials, int64_t dim, T factor) {
    const int64_t padded = round_to_width<T>(dim);
    for (int64_t key = task.key_begin; key < task.key_end; ++key) {
      memset(sum, 0, sizeof(T) * padded);
      for (int64_t c = 0; c < task.chunks; ++c) {
        const KeyRange seen = keys_seen(r, tiling, task.chunk_tiles[c], task.chunk_tiles[c + 1]);
        if (key < seen.begin || key >= seen.end) continue;
        const T* const part =
            reinterpret_cast<const T*>(static_cast<const char*>(partials) + c * task.chunk_bytes) + key * padded;
        for (int64_t d = 0; d < padded; d += S::width) S::store(sum + d, S::load(sum + d) + S::load(part + d));
      }
      char* const dst = const_cast<char*>(r.key_row(view, key));
      store_row<T>(view.dtype, dst, view.step(), dim, sum, factor);
    }
  };
  write(params.dk, task.dk, p.head_dim, static_cast<T>(p.scale));
  write(params.dv, task.dv, p.value_dim, T{1});
}

}  // namespace
}  // namespace attn_ops::cpu
