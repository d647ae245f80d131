// dq = scale ds k: a block keeps a tile of query rows (and their gradients of the output), all their keys and values
// pass: twice where delta is not known, as it is needed before the first ds.
#pragma once

#include "backward.cuh"

namespace attn_ops::cuda {

// Of a warp's query rows.
template <int kMmaM>
struct RowGradients {
  RowGradient row[kMmaM][2];
  float largest_dp[kMmaM][2] = {};  // the largest |dp|, as far as this lane has seen it: of delta's pass

  ATTN_DEVICE RowGradients(const BackwardArgs& args, const Head& head, int first_row, bool knows_delta) {
    for_each(head, first_row,
             [&](RowGradient& own, int64_t i) { own = RowGradient(head.p, i, knows_delta ? args.delta[i] : 0.0f); });
  }

  // body(row, its number in [batch, num_heads, seqlen_q]) of those that may see something.
  template <class Body>
  ATTN_DEVICE void for_each(const Head& head, int first_row, Body body) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int index = first_row + 16 * m + 8 * half + (lane_index() >> 2);
        if (index >= head.rows_in_length()) continue;
        const int position = head.position(index);
        body(row[m][half], head.statistic(head.head(index, position), position));
      }
  }
};

// use(m, half, s, p, hidden, dp) for each pair of a query row and a key, with query rows down and keys across: where
// the row is among the lane's, the product (kThroughCap: where there is a cap, its derivative instead), of it the
// probability, whether that is hidden, what dropout leaves of dp.
template <class M, bool kPlain, bool kThroughCap, int kMmaM, int kMmaN, class Use>
ATTN_DEVICE void for_each_pair(Acc<kMmaM, kMmaN>& s, const Acc<kMmaM, kMmaN>& dp, const RowGradients<kMmaM>& rows,
                               const Head& head, int first_row, int first_key, bool sees_all, Use use) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  const float scale = head.factors.scale;
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowGradient& own = rows.row[m][half];
      if (kPlain && sees_all) {
#pragma unroll
        for (int n = 0; n < kMmaN; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            use(m, half, s[m][n][i], own.probability(product(s[m][n][i], scale)), false, dp[m][n][i]);
          }
        continue;
      }
      const int row = recomputed(first_row + 16 * m + 8 * half + g);
      const Interval seen = head.seen(row);
      const int position = head.position(row), query_head = head.head(row, position);
      const KeysAlongRow key{first_key, t};
      float x[2 * kMmaN];
#pragma unroll
      for (int i = 0; i < 2 * kMmaN; ++i) x[i] = s[m][i >> 1][2 * half + (i & 1)];
      hide_or_scale<M, kPlain>(x, head, query_head, position, seen, key);
      if (!kPlain && kThroughCap && head.factors.cap != 0.0f) {
#pragma unroll
        for (int i = 0; i < 2 * kMmaN; ++i) {
          float& product = s[m][i >> 1][2 * half + (i & 1)];
          product = cap_slope(product, head.factors);
        }
      }
      float d[2 * kMmaN];
#pragma unroll
      for (int i = 0; i < 2 * kMmaN; ++i) d[i] = dp[m][i >> 1][2 * half + (i & 1)];
      if (!kPlain && head.factors.drop_below > 0) {
        const KeptOfRow<kMmaN> kept(head, first_key, position, query_head);
#pragma unroll
        for (int i = 0; i < 2 * kMmaN; ++i) d[i] = kept(i >> 1, i & 1) ? d[i] * head.factors.keep : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 2 * kMmaN; ++i) {
        const float p = own.probability_or_hidden(x[i]);
        use(m, half, s[m][i >> 1][2 * half + (i & 1)], p, is_hidden(p), d[i]);
      }
    }
}

// s becomes ds; kThroughCap: the gradient of the product, before the cap.
template <class M, bool kPlain, bool kThroughCap, int kMmaM, int kMmaN>
ATTN_DEVICE void score_gradients(Acc<kMmaM, kMmaN>& s, const Acc<kMmaM, kMmaN>& dp, const RowGradients<kMmaM>& rows,
                                 const Head& head, int first_row, int first_key, bool sees_all) {
  const bool capped = !kPlain && kThroughCap && head.factors.cap != 0.0f;
  for_each_pair<M, kPlain, kThroughCap, kMmaM, kMmaN>(s, dp, rows, head, first_row, first_key, sees_all,
                                                      [&](int m, int half, float& s, float p, bool hidden, float dp) {
                                                        const float ds = rows.row[m][half].of_score(p, dp);
                                                        s = hidden ? p : capped ? through_cap(ds, s) : ds;
                                                      });
}

// The sum of p dp over the keys of a tile, as far as this lane has them, is added to delta.
template <class M, bool kPlain, int kMmaM, int kMmaN>
ATTN_DEVICE void add_to_delta(RowGradients<kMmaM>& rows, Acc<kMmaM, kMmaN>& s, const Acc<kMmaM, kMmaN>& dp,
                              const Head& head, int first_row, int first_key, bool sees_all) {
  float sum[kMmaM][2] = {};
  for_each_pair<M, kPlain, false, kMmaM, kMmaN>(
      s, dp, rows, head, first_row, first_key, sees_all, [&](int m, int half, float&, float p, bool hidden, float dp) {
        sum[m][half] += hidden ? 0.0f : p * dp;
        if constexpr (M::kMath == Math::kFloat16) {
          rows.largest_dp[m][half] = fmaxf(rows.largest_dp[m][half], hidden ? 0.0f : fabsf(dp));
        }
      });
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.row[m][half].delta += sum[m][half];
}

// The lanes' parts of delta become delta, which is stored for the kernels to come.
template <int kMmaM>
ATTN_DEVICE void finish_delta(RowGradients<kMmaM>& rows, const BackwardArgs& args, const Head& head, int first_row) {
  const float* d_lse = static_cast<const float*>(args.b.d_lse);
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& delta = rows.row[m][half].delta;
      delta += shuffle_xor(delta, 1);
      delta += shuffle_xor(delta, 2);
    }
  rows.for_each(head, first_row, [&](RowGradient& row, int64_t i) {
    if (d_lse != nullptr) row.delta -= d_lse[i];
    if ((lane_index() & 3) == 0) args.delta[i] = row.delta;
  });
}

// float16 ends at 65504, and at 2^-24 below: the gradients of a row are brought near the upper end, by a power of two
// that its weights are multiplied with, or the small parts of ds were nothing. Returns what undoes it.
ATTN_DEVICE float widen(RowGradient& row, float largest_dp) {
  largest_dp = fmaxf(largest_dp, shuffle_xor(largest_dp, 1));
  largest_dp = fmaxf(largest_dp, shuffle_xor(largest_dp, 2));
  const float largest = fmaxf(largest_dp, fabsf(row.delta));  // d_lse is in delta
  // A power of two, and |ds| < 4 power.
  const float power = float_of(bits_of(fminf(fmaxf(largest, 0x1p-100f), 0x1p100f)) & kInfinityBits);
  row.inverse_sum *= 0x1p13f / power;
  return power * 0x1p-13f;
}

template <class M, int kDim, bool kPlain>
ATTN_DEVICE void query_gradient(const BackwardArgs& args) {
  using Element = typename M::Element;
  using Shape = BackwardShape<M, kDim, kPlain>;
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kThreads = Shape::kThreads;
  constexpr int kMmaM = Shape::kMmaM, kMmaN = Shape::kMmaN;
  const BackwardTiles<M, kDim, kPlain> tiles;
  const auto q = tiles.stationary(0), d_out = tiles.stationary(1);

  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const Head head(p, args.factors, args.rows, block_index() / args.rows.tiles);
  // Under a causal mask the last rows see the most: they begin first.
  const int tile = args.rows.tiles - 1 - block_index() % args.rows.tiles;
  const RowBlock block(head, tile * kBlockM, kBlockM);
  const int warp_row = warp_index() * 16 * kMmaM, first_row = block.first + warp_row;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const auto keys = [&](int first) { return KeyRows<const Element>(p.k, head, first, head.length_k, args.aligned.k); };

  RowGradients<kMmaM> rows(args, head, first_row, !sums_delta(M::kMath));
  const auto next = [&](int key) { return kPlain ? key : block.next_shown(head, key, kBlockN); };
  const int begin = next(round_down(block.any.begin, kBlockN));
  if (begin < block.any.end) {
    const int limit = head.rows_in_length();
    load_tile<M, kDim, kBlockM, kThreads>(q, QueryRows<const Element>(p.q, head, block.first, limit, args.aligned.q),
                                          head_dim);
    load_tile<M, kDim, kBlockM, kThreads>(
        d_out, QueryRows<const Element>(b.d_out, head, block.first, limit, args.aligned.d_out), value_dim);
  }
  // use(s, dp, key, sees_all, the tile of keys) for each tile of keys.
  const auto pass = [&](auto use) {
    stream<Shape::kStages, kBlockN>(
        begin, block.any.end, next,
        [&](int key, int stage) {
          load_tile<M, kDim, kBlockN, kThreads>(tiles.streamed(0, stage), keys(key), head_dim);
          const KeyRows<const Element> values(p.v, head, key, head.length_k, args.aligned.v);
          load_tile<M, kDim, kBlockN, kThreads>(tiles.streamed(1, stage), values, value_dim);
        },
        [](int) {},
        [&](int key, int stage) {
          const auto k = tiles.streamed(0, stage), v = tiles.streamed(1, stage);
          Acc<kMmaM, kMmaN> s, dp;
          gemm_nt<M, kDim, kMmaM, kMmaN>(s, q, warp_row, k);
          gemm_nt<M, kDim, kMmaM, kMmaN>(dp, d_out, warp_row, v);
          use(s, dp, key, kPlain && block.sees_all(key, kBlockN), k);
        });
  };
  if constexpr (sums_delta(M::kMath)) {
    pass([&](auto& s, const auto& dp, int key, bool sees_all, const auto&) {
      add_to_delta<M, kPlain, kMmaM, kMmaN>(rows, s, dp, head, first_row, key, sees_all);
    });
    finish_delta<kMmaM>(rows, args, head, first_row);
  }
  float factor[kMmaM][2];
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[m][half] = args.factors.scale;
      if constexpr (M::kMath == Math::kFloat16) factor[m][half] *= widen(rows.row[m][half], rows.largest_dp[m][half]);
    }
  Acc<kMmaM, kDim / 8> dq;
  clear<kMmaM, kDim / 8>(dq);
  pass([&](auto& s, const auto& dp, int key, bool sees_all, const auto& k) {
    score_gradients<M, kPlain, true, kMmaM, kMmaN>(s, dp, rows, head, first_row, key, sees_all);
    const bool nonfinite = loses_nonfinite<M>(sees_all) && zero_nonfinite_rows<M, kBlockN, kThreads>(k, tiles.flags());
    // All of ds: what keys have in common cancels, however large it is.
    gemm_nn<M, kDim, kMmaM, kMmaN, M::kPartsOfFloat>(dq, s, k, head_dim);
    if (nonfinite) add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(dq, s, tiles.flags(), keys(key), head_dim);
  });

  // Only this warp reads these rows of the query tile, and it has done so.
  sync_warp();
  write_acc<M, kDim, kMmaM>(q, warp_row, dq, factor);
  sync_warp();
  store_rows<M, kDim>(q, warp_row, 16 * kMmaM, QueryRows<Element>(b.dq, head, block.first, block.end, args.aligned.dq),
                      head_dim);
}

}  // namespace attn_ops::cuda
