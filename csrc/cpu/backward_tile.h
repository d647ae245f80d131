// A tile of query rows in backward: what is read of its rows, and the scratch that tiles share.
#pragma once

#include "row_group.h"
#include "key_rows.h"
#include "pair_weights.h"
#include "row_tile.h"
#include "scores.h"

namespace attn_ops::cpu {
namespace {

// Whether what forward left is too coarse, or not of these scores:
// - `out` of 16 bits. delta must cancel what the dp of a row have in common; where one channel of the keys is huge, as
//   trained models have it, what the rounding of `out` leaves of that is many times the gradient of the query.
// - Few rows. Forward summed their scores in another order (head_lanes.h).
// - Pairs. Forward may have made their scores of floats.
template <class E>
bool recomputes_statistics(const AttentionParams& p) {
  return kOfPairs<E> || size_of(p.dtype) == 2 || few_rows<Accumulator<E>>(p);
}

// The scores and dp of a tile, [key - first][lanes], that the pass for the statistics leaves for the one after it: 5 products
// instead of 7. They go through L2, which costs a quarter of computing them again.
template <class T>
struct KeptScores {
  T *s = nullptr, *dp = nullptr;  // null: nothing is kept
  Visibility* seen;               // of each block
  int64_t first;                  // a multiple of kBlockKeys

  Visibility& seen_of(int64_t k0) const { return seen[(k0 - first) / kBlockKeys]; }
};

template <class E, class T = Accumulator<E>>
struct BackwardTile : RowTile<T> {
  E *q, *d_out;             // transposed: [head_dim or value_dim][lanes]; q is scaled (Scale::of_q)
  T* dq;                    // the same
  E *q_rows, *d_out_rows;   // row major, padded to whole vectors: [lanes][padded dim]; pairs are of two rows
  // p = e^(s - m) inverse_l; a row that sees nothing has 0, 0 and delta 0.
  T m[RowTile<T>::max_lanes], inverse_l[RowTile<T>::max_lanes], delta[RowTile<T>::max_lanes];
  bool q_finite, d_out_finite;
  KeptScores<T> kept;
};

// Tiles side by side in one block of p and ds, so that the sums over rows in dv, dk are long enough to pay for reading and
// writing dv, dk: 48 rows, of a matrix unit 96.
template <class E>
constexpr int joint_tiles() {
  constexpr int lanes = RowTile<Accumulator<E>>::max_lanes, rows = kOfTiles<E> ? 96 : 48;
  constexpr int wanted = (rows + lanes - 1) / lanes;
  return wanted < kBackwardTiles ? wanted : kBackwardTiles;
}

// The keys and values of a head as backward reads them. Of pairs the keys are there twice: two columns an element for
// scores, two keys an element for dq.
template <class E>
struct BackwardKeys {
  KeyRows<E> keys, values;
  std::conditional_t<kOfPairs<E>, KeyPairs<E>, KeyPairs<E>&> key_pairs;  // of numbers, `keys`

  static int64_t bytes(const AttentionParams& p) {
    return KeyRows<E>::bytes(p, p.head_dim) + KeyRows<E>::bytes(p, p.value_dim) +
           (kOfPairs<E> ? KeyPairs<E>::bytes(p, p.head_dim) : 0);
  }
  BackwardKeys(const HeadRows& r, const Passes& passes, Arena* arena)
      : keys(r, r.p.k, r.p.k_scales, r.p.head_dim, passes, arena),
        values(r, r.p.v, r.p.v_scales, r.p.value_dim, passes, arena),
        key_pairs(paired(r, passes, arena)) {}

  void load(int64_t k0, int64_t k1) {
    keys.load(k0, k1);
    values.load(k0, k1);
    if (kOfPairs<E>) key_pairs.load(k0, k1);
  }

 private:
  decltype(key_pairs) paired(const HeadRows& r, const Passes& passes, Arena* arena) {
    if constexpr (kOfPairs<E>) return {r, r.p.k, r.p.k_scales, r.p.head_dim, passes, arena};
    else return keys;
  }
};

template <class E, class T = Accumulator<E>>
struct BackwardScratch {
  static constexpr int64_t max_joint = joint_tiles<E>() * RowTile<T>::max_lanes;
  BackwardTile<E>* tiles;
  T *p, *ds, *factors, *cap_slopes;
  QueryWeights<E> of_query;
  KeptScores<T> kept[joint_tiles<E>()];
  ScoreScratch<T> score;

  // Keys for whose scores there is room, or 0: none are kept.
  static int64_t kept_keys(const AttentionParams& params) {
    const int64_t keys = (params.seqlen_k / kBlockKeys + 1) * kBlockKeys;
    const int64_t most = kKeptScoresBytes / (2 * static_cast<int64_t>(sizeof(T)) * max_joint) / kBlockKeys * kBlockKeys;
    if (!recomputes_statistics<E>(params) || params.soft_cap != 0) return 0;
    return keys < most ? keys : most;
  }

  static int64_t bytes(const AttentionParams& params) {
    const int64_t lanes = RowTile<T>::max_lanes, d = params.head_dim, dv = params.value_dim;
    const int64_t row_elements = kBackwardTiles * elements<E>(lanes) + MatrixUnit<E>::depth - 1;
    return Arena::bytes<BackwardTile<E>>(kBackwardTiles) + Arena::bytes<E>(kBackwardTiles * lanes * padded_elements<E>(d)) +
           Arena::bytes<T>(kBackwardTiles * lanes * d) + Arena::bytes<E>(kBackwardTiles * lanes * padded_elements<E>(dv)) +
           Arena::bytes<E>(row_elements * round_to_width<T>(d)) + Arena::bytes<E>(row_elements * round_to_width<T>(dv)) +
           BackwardKeys<E>::bytes(params) + 2 * Arena::bytes<T>(kBlockKeys * max_joint) +
           Arena::bytes<T>(kBlockKeys * lanes) + Arena::bytes<T>(params.soft_cap != 0 ? kBlockKeys * lanes : 0) +
           QueryWeights<E>::bytes() +
           joint_tiles<E>() * (2 * Arena::bytes<T>(kept_keys(params) * lanes) +
                               Arena::bytes<Visibility>(kept_keys(params) / kBlockKeys)) +
           ScoreScratch<T>::bytes(params);
  }

  // Consecutive tiles lie behind one another, without gaps, so that joint tiles are one matrix.
  BackwardScratch(const AttentionParams& params, Arena& arena) : of_query(arena) {
    const int64_t lanes = RowTile<T>::max_lanes, d = params.head_dim, dv = params.value_dim;
    const int64_t row_elements = kBackwardTiles * elements<E>(lanes) + MatrixUnit<E>::depth - 1;
    tiles = arena.take<BackwardTile<E>>(kBackwardTiles);
    tiles[0].q = arena.take<E>(kBackwardTiles * lanes * padded_elements<E>(d));
    tiles[0].dq = arena.take<T>(kBackwardTiles * lanes * d);
    tiles[0].d_out = arena.take<E>(kBackwardTiles * lanes * padded_elements<E>(dv));
    tiles[0].q_rows = arena.take<E>(row_elements * round_to_width<T>(d));
    tiles[0].d_out_rows = arena.take<E>(row_elements * round_to_width<T>(dv));
    p = arena.take<T>(kBlockKeys * max_joint);
    ds = arena.take<T>(kBlockKeys * max_joint);
    factors = arena.take<T>(kBlockKeys * lanes);
    cap_slopes = params.soft_cap != 0 ? arena.take<T>(kBlockKeys * lanes) : nullptr;
    for (KeptScores<T>& of_tile : kept) {
      of_tile.s = arena.take<T>(kept_keys(params) * lanes);
      of_tile.dp = arena.take<T>(kept_keys(params) * lanes);
      of_tile.seen = arena.take<Visibility>(kept_keys(params) / kBlockKeys);
    }
    score = ScoreScratch<T>(params, &arena);
  }
};

// Reads the rows of `tile` (its geometry is set up) into the scratch, and their statistics where those will do.
template <class E>
void start_tile(const BackwardParams& params, const HeadRows& r, BackwardTile<E>& tile) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  const AttentionParams& p = r.p;
  const int64_t padded_d = round_to_width<T>(p.head_dim), padded_dv = round_to_width<T>(p.value_dim);
  char *q[RowTile<T>::max_lanes], *out[RowTile<T>::max_lanes], *d_out[RowTile<T>::max_lanes];
  tile.tensor_rows(r, p.q, q);
  tile.tensor_rows(r, p.out, out);
  tile.tensor_rows(r, params.d_out, d_out);

  load_factors<E>(p.dtype, q, tile.rows, tile.lanes, p.q.step(), p.head_dim, Scale<E>(p.scale).of_q, tile.q);
  load_factors<E>(p.dtype, d_out, tile.rows, tile.lanes, params.d_out.step(), p.value_dim, T{1}, tile.d_out);
  load_rows<E>(p.dtype, q, tile.rows, tile.lanes, p.q.step(), p.head_dim, tile.q_rows);
  load_rows<E>(p.dtype, d_out, tile.rows, tile.lanes, params.d_out.step(), p.value_dim, tile.d_out_rows);
  memset(tile.dq, 0, sizeof(T) * tile.lanes * p.head_dim);

  const bool recomputes = recomputes_statistics<E>(p);
  const T* const statistics = static_cast<const T*>(p.statistics);
  const T* const d_lse = static_cast<const T*>(params.d_lse);
  for (int i = 0; i < tile.lanes; ++i) {
    tile.m[i] = recomputes ? -kInfinity<T> : T{0};
    tile.inverse_l[i] = tile.delta[i] = 0;
    if (i >= tile.rows || recomputes) continue;
    const int64_t at = r.statistic(tile.position[i], tile.head[i]);
    if (statistics[2 * at + 1] == 0) continue;
    tile.m[i] = statistics[2 * at];
    tile.inverse_l[i] = 1 / statistics[2 * at + 1];
    if constexpr (!kOfPairs<E>) {  // theirs are always recomputed
      Vec<T> sum = S::zero();
      with_storage(T{}, p.dtype, [&](auto storage) {
        for (int64_t d = 0; d < p.value_dim; d += S::width)
          sum = S::fma(S::load(tile.d_out_rows + i * padded_dv + d),
                       load_some<T>(storage, out[i] + d * p.out.step(), p.out.step(), p.value_dim - d), sum);
      });
      for (int v = 0; v < S::width; ++v) tile.delta[i] += sum[v];
    }
    if (d_lse) tile.delta[i] -= d_lse[at];
  }
  tile.q_finite = all_finite(tile.q_rows, padded_d, elements<E>(tile.lanes), padded_d);
  tile.d_out_finite = all_finite(tile.d_out_rows, padded_dv, elements<E>(tile.lanes), padded_dv);
}

}  // namespace
}  // namespace attn_ops::cpu
