// dq = scale ds k: a block keeps a tile of query rows (and their gradients of the output), all their keys and values
// pass.
#pragma once

#include "backward.cuh"

namespace attn_ops {
namespace cuda {

// The statistics of a warp's query rows: log2(e) lse, and delta.
template <int kM>
struct QueryStatistics {
  float lse[kM][2], delta[kM][2];

  ATTN_DEVICE QueryStatistics(const BackwardArgs& args, const Head& head, int first_row) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 16 * m + 8 * half + (lane_index() >> 2);
        lse[m][half] = delta[m][half] = 0.0f;
        if (row >= head.rows_in_length()) continue;
        const int position = head.position(row);
        const int64_t i = head.statistic(head.head(row, position), position);
        lse[m][half] = static_cast<const float*>(head.p.lse)[i] * kLog2E;
        delta[m][half] = args.delta[i];
      }
  }
};

// s becomes ds, with query rows down and keys across.
template <class M, bool kPlain, int kM, int kN>
ATTN_DEVICE void score_gradients(Results<kM, kN>& s, const Results<kM, kN>& dp, const QueryStatistics<kM>& rows,
                                 const Head& head, int first_row, int first_key, bool sees_all) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  const float scale = head.factors.scale_log2e;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float lse = rows.lse[m][half], delta = rows.delta[m][half];
      if (kPlain && sees_all) {
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = recomputed_probability(product(s[m][n][i], scale), lse) * (dp[m][n][i] - delta);
          }
        continue;
      }
      const int row = recomputed(first_row + 16 * m + 8 * half + g);
      const Interval seen = head.seen(row);
      const int position = head.position(row), query_head = head.head(row, position);
      const auto key = [=](int i) { return first_key + 8 * (i >> 1) + 2 * t + (i & 1); };
      float x[2 * kN];
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) x[i] = s[m][i >> 1][2 * half + (i & 1)];
      hide_or_scale<M, kPlain>(x, head, query_head, position, seen, key);
      float d[2 * kN];
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) d[i] = dp[m][i >> 1][2 * half + (i & 1)];
      if (!kPlain && head.factors.drop_below > 0) {
        const KeptOfRow<kN> kept(head, first_key, position, query_head);
#pragma unroll
        for (int i = 0; i < 2 * kN; ++i) d[i] = kept(i >> 1, i & 1) ? d[i] * head.factors.keep : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) {
        s[m][i >> 1][2 * half + (i & 1)] = PairGradient(x[i], lse, d[i], delta).ds;
      }
    }
}

template <class M, int kDim, bool kPlain>
ATTN_DEVICE void query_gradient(const BackwardArgs& args) {
  using Element = typename M::Element;
  using Shape = BackwardShape<M, kDim, kPlain>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kColumns, kThreads = Shape::kThreads;
  constexpr int kM = Shape::kM, kN = Shape::kN;
  const BackwardTiles<M, kDim, kPlain> tiles;
  const auto q = tiles.staying(0), d_out = tiles.staying(1);

  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const Head head(p, args.factors, args.rows, block_index() / args.rows.tiles);
  // Under a causal mask the last rows see the most: they begin first.
  const int tile = args.rows.tiles - 1 - block_index() % args.rows.tiles;
  const RowBlock block(head, tile * kRows, kRows);
  const int own_row = warp_index() * 16 * kM, first_row = block.first + own_row;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const auto keys = [&](int first) { return KeyRows<const Element>(p.k, head, first, head.length_k, args.aligned.k); };

  Results<kM, kDim / 8> dq;
  clear<kM, kDim / 8>(dq);
  const QueryStatistics<kM> rows(args, head, first_row);
  const int begin = round_down(block.any.begin, kKeys);
  if (begin < block.any.end) {
    const int limit = head.rows_in_length();
    load_tile<M, kDim, kRows, kThreads>(q, QueryRows<const Element>(p.q, head, block.first, limit, args.aligned.q),
                                        head_dim);
    load_tile<M, kDim, kRows, kThreads>(
        d_out, QueryRows<const Element>(b.d_out, head, block.first, limit, args.aligned.d_out), value_dim);
  }
  stream<Shape::kStages, kKeys>(
      begin, block.any.end,
      [&](int key, int stage) {
        load_tile<M, kDim, kKeys, kThreads>(tiles.passing(0, stage), keys(key), head_dim);
        const KeyRows<const Element> values(p.v, head, key, head.length_k, args.aligned.v);
        load_tile<M, kDim, kKeys, kThreads>(tiles.passing(1, stage), values, value_dim);
      },
      [&](int key, int stage) {
        const auto k = tiles.passing(0, stage), v = tiles.passing(1, stage);
        Results<kM, kN> s, dp;
        multiply_rows<M, kDim, kM, kN>(s, q, own_row, k);
        multiply_rows<M, kDim, kM, kN>(dp, d_out, own_row, v);
        const bool sees_all = kPlain && block.sees_all(key, kKeys);
        score_gradients<M, kPlain, kM, kN>(s, dp, rows, head, first_row, key, sees_all);
        const bool nonfinite = !sees_all && take_out_nonfinite<M, kDim, kKeys, kThreads>(k, tiles.flags());
        accumulate<M, kDim, kM, kN>(dq, s, k, head_dim);
        if (nonfinite) add_nonfinite<M, kDim, kM, kN>(dq, s, tiles.flags(), keys(key), head_dim);
      });

  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) factor[m][0] = factor[m][1] = args.factors.scale;
  // Only this warp reads these rows of the query tile, and it has done so.
  sync_warp();
  write_results<M, kDim, kM>(q, own_row, dq, factor);
  sync_warp();
  store_rows<M, kDim>(q, own_row, 16 * kM, QueryRows<Element>(b.dq, head, block.first, block.end, args.aligned.dq),
                      head_dim);
}

}  // namespace cuda
}  // namespace attn_ops
