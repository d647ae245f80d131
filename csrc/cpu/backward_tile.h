// A tile of query rows in backward: what is read of its rows, and the scratch that tiles share.
#pragma once

#include "head_lanes.h"
#include "key_rows.h"
#include "row_tile.h"
#include "scores.h"

namespace attn_ops::cpu {
namespace {

template <class T>
struct BackwardTile : RowTile<T> {
  T *q, *d_out, *dq;             // transposed: [head_dim or value_dim][lanes]; q holds scale q
  T *q_rows, *d_out_rows;        // row major, padded to whole vectors: [lanes][padded dim]
  // p = e^(s - m) inverse_l; a row that sees nothing has 0, 0 and delta 0.
  T m[RowTile<T>::max_lanes], inverse_l[RowTile<T>::max_lanes], delta[RowTile<T>::max_lanes];
  bool q_finite, d_out_finite;
};

// Tiles side by side in one block of p and ds, so that the sums over rows in dv, dk are long enough (>= 48) to pay
// for reading and writing dv, dk.
template <class T>
constexpr int joint_tiles() {
  constexpr int wanted = (48 + RowTile<T>::max_lanes - 1) / RowTile<T>::max_lanes;
  return wanted < kBackwardTiles ? wanted : kBackwardTiles;
}

template <class T>
struct BackwardScratch {
  static constexpr int64_t max_joint = joint_tiles<T>() * RowTile<T>::max_lanes;
  BackwardTile<T>* tiles;
  T *p, *ds, *factors, *cap_slopes;
  ScoreScratch<T> score;

  static int64_t bytes(const AttentionParams& params) {
    const int64_t lanes = RowTile<T>::max_lanes, d = params.head_dim, dv = params.value_dim;
    return Arena::bytes<BackwardTile<T>>(kBackwardTiles) + Arena::bytes<T>(kBackwardTiles * lanes * d) * 2 +
           Arena::bytes<T>(kBackwardTiles * lanes * dv) +
           Arena::bytes<T>(kBackwardTiles * lanes * round_to_width<T>(d)) +
           Arena::bytes<T>(kBackwardTiles * lanes * round_to_width<T>(dv)) + KeyRows<T>::bytes(params, d) +
           KeyRows<T>::bytes(params, dv) + 2 * Arena::bytes<T>(kBlockKeys * max_joint) +
           Arena::bytes<T>(kBlockKeys * lanes) + Arena::bytes<T>(params.soft_cap != 0 ? kBlockKeys * lanes : 0) +
           ScoreScratch<T>::bytes(params);
  }

  // Consecutive tiles lie behind one another, without gaps, so that joint tiles are one matrix.
  BackwardScratch(const AttentionParams& params, Arena& arena) {
    const int64_t lanes = RowTile<T>::max_lanes, d = params.head_dim, dv = params.value_dim;
    tiles = arena.take<BackwardTile<T>>(kBackwardTiles);
    tiles[0].q = arena.take<T>(kBackwardTiles * lanes * d);
    tiles[0].dq = arena.take<T>(kBackwardTiles * lanes * d);
    tiles[0].d_out = arena.take<T>(kBackwardTiles * lanes * dv);
    tiles[0].q_rows = arena.take<T>(kBackwardTiles * lanes * round_to_width<T>(d));
    tiles[0].d_out_rows = arena.take<T>(kBackwardTiles * lanes * round_to_width<T>(dv));
    p = arena.take<T>(kBlockKeys * max_joint);
    ds = arena.take<T>(kBlockKeys * max_joint);
    factors = arena.take<T>(kBlockKeys * lanes);
    cap_slopes = params.soft_cap != 0 ? arena.take<T>(kBlockKeys * lanes) : nullptr;
    score = ScoreScratch<T>(params, &arena);
  }
};

// Whether what forward left is too coarse, or not of these scores:
// - `out` of 16 bits. delta must cancel what the dp of a row have in common; where one channel of the keys is huge, as
//   trained models have it, what the rounding of `out` leaves of that is many times the gradient of the query.
// - Few rows. Forward summed their scores in another order (head_lanes.h).
template <class T>
bool recomputes_statistics(const AttentionParams& p) {
  return size_of(p.dtype) == 2 || few_rows<T>(p);
}

// Reads the rows of `tile` (its geometry is set up) into the scratch, and their statistics where those will do.
template <class T>
void start_tile(const BackwardParams& params, const HeadRows& r, BackwardTile<T>& tile) {
  using S = Simd<T>;
  const AttentionParams& p = params.forward;
  const int64_t padded_d = round_to_width<T>(p.head_dim), padded_dv = round_to_width<T>(p.value_dim);
  char *q[RowTile<T>::max_lanes], *out[RowTile<T>::max_lanes], *d_out[RowTile<T>::max_lanes];
  tile.tensor_rows(r, p.q, q);
  tile.tensor_rows(r, p.out, out);
  tile.tensor_rows(r, params.d_out, d_out);

  const Vec<T> factor = S::set1(static_cast<T>(p.scale));
  load_transposed<T>(p.dtype, q, tile.rows, tile.lanes, p.q.step(), p.head_dim, tile.q, tile.lanes,
                     [=](T* at, Vec<T> x) { S::store(at, x * factor); });
  load_transposed<T>(p.dtype, d_out, tile.rows, tile.lanes, params.d_out.step(), p.value_dim, tile.d_out, tile.lanes,
                     [](T* at, Vec<T> x) { S::store(at, x); });
  memset(tile.dq, 0, sizeof(T) * tile.lanes * p.head_dim);
  memset(tile.q_rows, 0, sizeof(T) * tile.lanes * padded_d);
  memset(tile.d_out_rows, 0, sizeof(T) * tile.lanes * padded_dv);

  const bool recomputes = recomputes_statistics<T>(p);
  const T* const statistics = static_cast<const T*>(p.statistics);
  const T* const d_lse = static_cast<const T*>(params.d_lse);
  for (int i = 0; i < tile.lanes; ++i) {
    tile.m[i] = recomputes ? -kInfinity<T> : T{0};
    tile.inverse_l[i] = tile.delta[i] = 0;
    if (i >= tile.rows) continue;
    T* const d_out_row = tile.d_out_rows + i * padded_dv;
    load_row<T>(p.dtype, q[i], p.q.step(), p.head_dim, true, tile.q_rows + i * padded_d);
    load_row<T>(p.dtype, d_out[i], params.d_out.step(), p.value_dim, true, d_out_row);
    const int64_t at = r.statistic(tile.position[i], tile.head[i]);
    if (recomputes || statistics[2 * at + 1] == 0) continue;
    tile.m[i] = statistics[2 * at];
    tile.inverse_l[i] = 1 / statistics[2 * at + 1];
    Vec<T> sum = S::zero();
    with_storage(T{}, p.dtype, [&](auto storage) {
      for (int64_t d = 0; d < p.value_dim; d += S::width)
        sum = S::fma(S::load(d_out_row + d),
                     load_some<T>(storage, out[i] + d * p.out.step(), p.out.step(), p.value_dim - d), sum);
    });
    for (int v = 0; v < S::width; ++v) tile.delta[i] += sum[v];
    if (d_lse) tile.delta[i] -= d_lse[at];
  }
  tile.q_finite = all_finite(tile.q_rows, padded_d, tile.lanes, padded_d);
  tile.d_out_finite = all_finite(tile.d_out_rows, padded_dv, tile.lanes, padded_dv);
}

}  // namespace
}  // namespace attn_ops::cpu
