// dq = scale ds k: a block keeps a tile of query rows (and their gradients of the output), all their keys and values
// pass.
//
// The sum of a row's ds is d_lse: what all keys have in common cancels in dq, however large it is, and must do so in 16
// bits too. There are three ways. In float32 delta is known (delta.cuh). Where registers allow (passes_once), a second
// sum is what the keys have in common, with which dq is corrected,
//
//   kbar = sum_j w_j k_j / sum_j w_j      dq = scale (sum_j ds_j k_j - t kbar)      w: p, times the derivative of a cap
//
// where t is by how much the sum of ds, as it was rounded, is off: by its rounding, and as delta = rowsum(d_out * out)
// has that of out, by (rowsum(p * dp) - d_lse - delta) sum_j w_j. Exact for a wrong delta, and for rounding up to how
// keys differ. Of plain calls, where w is p, what the sum of ds is to be is known: d_lse, and where a sink is among the
// weights, its share of delta. (It need not be that of all the ds, as p may be off by a factor: RowGradients.)
// Elsewhere keys pass twice, first for delta, and ds enters as several numbers, whose sum it is.
#pragma once

#include "backward.cuh"
#include "delta.cuh"

namespace attn_ops::cuda {

// Of a warp's query rows. kFused: whether scores and exponents may be made in one instruction (fits_fused), which leaves
// all probabilities of a row off by a factor. (And the sum that forward has left, whose own weights were.)
template <int kMmaM, bool kFused = false>
struct RowGradients {
  RowGradient row[kMmaM][2];
  bool fused = false;  // whether all of them fit
  float largest_dp[kMmaM][2] = {};  // the largest |dp|, as far as this lane has seen it: of delta's pass
  float weights[kMmaM][2] = {};  // the sum of p, the same

  ATTN_DEVICE RowGradients(const BackwardArgs& args, const Head& head, int first_row, bool knows_delta) {
    bool fits = true;
    for_each(head, first_row, [&](int m, int half, int, int64_t i) {
      row[m][half] = RowGradient(head.p, i, knows_delta ? args.delta[i] : 0.0f);
      fits &= row[m][half].fits();
    });
    if (kFused) fused = !any_in_warp(!fits);
  }

  // body(m, half, query head, the row's number in [batch, num_heads, seqlen_q]) of those that may see something.
  template <class Body>
  ATTN_DEVICE void for_each(const Head& head, int first_row, Body body) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int index = first_row + 16 * m + 8 * half + (lane_index() >> 2);
        if (index >= head.rows_in_length()) continue;
        const int position = head.position(index);
        const int query_head = head.head(index, position);
        body(m, half, query_head, head.statistic(query_head, position));
      }
  }
};

// use(m, half, s, own_dp, p, hidden, dp) for each pair of a query row and a key, with query rows down and keys across:
// where the row is among the lane's, the product (kThroughCap: where there is a cap, its derivative instead) and dp as
// they are kept, the probability, whether that is hidden, what dropout leaves of dp.
template <class M, bool kPlain, bool kThroughCap, int kMmaM, int kMmaN, bool kFused, class Use>
ATTN_DEVICE void for_each_pair(Acc<kMmaM, kMmaN>& s, Acc<kMmaM, kMmaN>& dp, const RowGradients<kMmaM, kFused>& rows,
                               const Head& head, int first_row, int first_key, bool sees_all, Use use) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  const float scale = head.factors.scale;
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowGradient& own = rows.row[m][half];
      if (kPlain && sees_all) {
        const auto use_all = [&](auto probability) {
#pragma unroll
          for (int n = 0; n < kMmaN; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              use(m, half, s[m][n][i], dp[m][n][i], probability(s[m][n][i]), false, dp[m][n][i]);
            }
        };
        if (kFused && rows.fused) {
          use_all([&](float x) { return own.fused().probability(x, scale); });
        } else {
          use_all([&](float x) { return own.probability(x, scale); });
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
        const int n = i >> 1, j = 2 * half + (i & 1);
        use(m, half, s[m][n][j], dp[m][n][j], p, is_hidden(p), d[i]);
      }
    }
}

// s becomes ds; kThroughCap: the gradient of the product, before the cap.
template <class M, bool kPlain, bool kThroughCap, int kMmaM, int kMmaN, bool kFused>
ATTN_DEVICE void score_gradients(Acc<kMmaM, kMmaN>& s, Acc<kMmaM, kMmaN>& dp, const RowGradients<kMmaM, kFused>& rows,
                                 const Head& head, int first_row, int first_key, bool sees_all) {
  const bool capped = !kPlain && kThroughCap && head.factors.cap != 0.0f;
  for_each_pair<M, kPlain, kThroughCap, kMmaM, kMmaN>(
      s, dp, rows, head, first_row, first_key, sees_all,
      [&](int m, int half, float& s, float&, float p, bool hidden, float dp) {
        const float ds = rows.row[m][half].of_score(p, dp);
        s = hidden ? p : capped ? through_cap(ds, s) : ds;
      });
}

// The sum of p dp over the keys of a tile, as far as this lane has them, is added to delta.
template <class M, bool kPlain, int kMmaM, int kMmaN, bool kFused>
ATTN_DEVICE void add_to_delta(RowGradients<kMmaM, kFused>& rows, Acc<kMmaM, kMmaN>& s, Acc<kMmaM, kMmaN>& dp,
                              const Head& head, int first_row, int first_key, bool sees_all) {
  float sum[kMmaM][2] = {};
  for_each_pair<M, kPlain, false, kMmaM, kMmaN>(
      s, dp, rows, head, first_row, first_key, sees_all,
      [&](int m, int half, float&, float&, float p, bool hidden, float dp) {
        sum[m][half] += hidden ? 0.0f : p * dp;
        if (kFused) rows.weights[m][half] += p;
        if constexpr (M::kMath == Math::kFloat16) {
          rows.largest_dp[m][half] = fmaxf(rows.largest_dp[m][half], hidden ? 0.0f : fabsf(dp));
        }
      });
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.row[m][half].delta += sum[m][half];
}

// delta of a warp's rows, as `out` gives it.
template <class M, int kDim, int kMmaM, bool kFused>
ATTN_DEVICE void delta_of_output(RowGradients<kMmaM, kFused>& rows, const BackwardArgs& args, const Head& head,
                                 int first_row, int dim) {
  const AttentionParams& p = args.b.forward;
  const int limit = head.rows_in_length();
  const QueryRows<const uint16_t> out(p.out, head, first_row, limit, args.aligned.out);
  const QueryRows<const uint16_t> d_out(args.b.d_out, head, first_row, limit, args.aligned.d_out);
  const float* d_lse = static_cast<const float*>(args.b.d_lse);
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.row[m][half].delta = output_product<M, kDim>(out, d_out, 16 * m + 8 * half + (lane_index() >> 2), dim);
    }
  if (d_lse == nullptr) return;
  rows.for_each(head, first_row, [&](int m, int half, int, int64_t i) { rows.row[m][half].delta -= d_lse[i]; });
}

// delta of probabilities that are off by a factor: what is right is the mean of dp, times what a sink leaves of the weights.
template <int kMmaM, bool kFused>
ATTN_DEVICE void divide_by_weights(RowGradients<kMmaM, kFused>& rows, const Head& head, int first_row) {
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) sum_of_quad(rows.weights[m][half]);
  rows.for_each(head, first_row, [&](int m, int half, int query_head, int64_t) {
    const float weights = rows.weights[m][half], sum = 1.0f - rows.row[m][half].weight_of_sink(head.p, query_head);
    if (weights > 0.0f) rows.row[m][half].delta *= sum / weights;
  });
}

// The lanes' parts of delta become delta, which is stored for the kernels to come.
template <int kMmaM, bool kFused>
ATTN_DEVICE void finish_delta(RowGradients<kMmaM, kFused>& rows, const BackwardArgs& args, const Head& head,
                              int first_row) {
  const float* d_lse = static_cast<const float*>(args.b.d_lse);
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum_of_quad(rows.row[m][half].delta);
    }
  rows.for_each(head, first_row, [&](int m, int half, int, int64_t i) {
    float& delta = rows.row[m][half].delta;
    if (d_lse != nullptr) delta -= d_lse[i];
    if ((lane_index() & 3) == 0) args.delta[i] = delta;
  });
}

// float16 ends at 65504, and at 2^-24 below: the gradients of a row are brought near the upper end, or small ones (and
// the second parts of others) were nothing. What brings numbers up to `largest` below 2^14: a power of two.
ATTN_DEVICE float into_float16(float largest) {
  return 0x1p13f / float_of(bits_of(fminf(fmaxf(largest, 0x1p-100f), 0x1p100f)) & kInfinityBits);
}

// Where keys pass once: what is summed up beside dq, and how dq is corrected with it (see above).
template <class M, int kDim, bool kPlain, int kMmaM>
struct SinglePass {
  static constexpr bool kWidens = M::kMath == Math::kFloat16;
  using Rows = RowGradients<kMmaM, kPlain && kFuses<M>>;
  Acc<kMmaM, kDim / 8> dq;        // times `widened`
  Acc<kMmaM, kDim / 8> mean_key;  // times the sum of weights
  float widened[kMmaM][2];  // of ds in float16: from tile to tile only less, as little as fits
  float p_dp[kMmaM][2] = {};  // this lane's part of a row's
  float ds[kMmaM][2] = {}, weight[kMmaM][2] = {};  // the same, where the call is not plain
  float rounded[kMmaM][4] = {};  // the sums of ds (widened) and of weights as they were rounded, of two rows

  ATTN_DEVICE SinglePass() {
    clear<kMmaM, kDim / 8>(dq);
    clear<kMmaM, kDim / 8>(mean_key);
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) widened[m][0] = widened[m][1] = kWidens ? 0x1p100f : 1.0f;
  }

  // s becomes ds, dp the weights.
  template <int kMmaN>
  ATTN_DEVICE void make(Acc<kMmaM, kMmaN>& s, Acc<kMmaM, kMmaN>& dp, const Rows& rows, const Head& head, int first_row,
                        int first_key, bool sees_all) {
    const bool capped = !kPlain && head.factors.cap != 0.0f;
    float sum[kMmaM][2] = {};  // of this tile: one sum of all would lose the last bits of each
    for_each_pair<M, kPlain, true, kMmaM, kMmaN>(
        s, dp, rows, head, first_row, first_key, sees_all,
        [&](int m, int half, float& s, float& own_dp, float p, bool hidden, float dp) {
          sum[m][half] += hidden ? 0.0f : p * dp;
          const float own_ds = rows.row[m][half].of_score(p, dp), slope = s;
          s = hidden ? p : capped ? through_cap(own_ds, slope) : own_ds;
          own_dp = hidden || !capped ? p : through_cap(p, slope);
          if (!kPlain) ds[m][half] += s, weight[m][half] += own_dp;
        });
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) p_dp[m][half] += sum[m][half];
    if constexpr (kWidens) widen<kMmaN>(s);
  }

  template <int kMmaN>
  ATTN_DEVICE void widen(Acc<kMmaM, kMmaN>& ds) {
    float largest[kMmaM][2] = {};
    bool any = false;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kMmaN; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) largest[m][half] = fmaxf(largest[m][half], fabsf(ds[m][n][i]));
        any |= largest[m][half] * widened[m][half] > 0x1p15f;
      }
    if (any_in_warp(any)) {
#pragma unroll
      for (int m = 0; m < kMmaM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          largest_of_quad(largest[m][half]);
          if (!(largest[m][half] * widened[m][half] > 0x1p15f)) continue;
          const float before = widened[m][half];
          widened[m][half] = into_float16(largest[m][half]);
          const float factor = widened[m][half] / before;
          rounded[m][2 * half] *= factor;
#pragma unroll
          for (int n = 0; n < kDim / 8; ++n) dq[m][n][2 * half] *= factor, dq[m][n][2 * half + 1] *= factor;
        }
    }
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int n = 0; n < kMmaN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[m][n][i] *= widened[m][i >> 1];
  }

  // rows have delta as `out` gave it, and then as it is.
  ATTN_DEVICE void correct(Rows& rows, const BackwardArgs& args, const Head& head, int first_row) {
    float before[kMmaM][2], sum[kMmaM][2] = {};  // delta as it was; of a plain call, the sum of ds
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        before[m][half] = rows.row[m][half].delta;
        rows.row[m][half].delta = p_dp[m][half];
        sum_of_quad(ds[m][half]);
        sum_of_quad(weight[m][half]);
      }
    finish_delta(rows, args, head, first_row);
    const float* d_lse = static_cast<const float*>(args.b.d_lse);
    if (kPlain) {
      rows.for_each(head, first_row, [&](int m, int half, int query_head, int64_t i) {
        const RowGradient& row = rows.row[m][half];
        if (d_lse != nullptr) sum[m][half] = d_lse[i];
        if (head.p.sinks != nullptr) sum[m][half] += row.weight_of_sink(head.p, query_head) * row.delta;
      });
    }
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float narrowed = 1.0f / widened[m][half], weights = rounded[m][2 * half + 1];
        const float of_delta = (rows.row[m][half].delta - before[m][half]) * weight[m][half];
        const float excess = rounded[m][2 * half] * narrowed - (kPlain ? sum[m][half] : ds[m][half] - of_delta);
        const float share = weights > 0.0f ? excess / weights : 0.0f;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            dq[m][n][i] = dq[m][n][i] * narrowed - share * mean_key[m][n][i];
          }
      }
  }
};

// Where keys pass twice, by a power of two that a row's weights are multiplied with. Returns what undoes it.
ATTN_DEVICE float widen(RowGradient& row, float largest_dp) {
  largest_of_quad(largest_dp);
  const float factor = into_float16(fmaxf(largest_dp, fabsf(row.delta)));  // d_lse is in delta; |ds| < 4 of that
  row.inverse_sum *= factor;
  return 1.0f / factor;
}

// block_index(): the block's number, of those that make dq.
template <class M, int kDim, bool kPlain, class Index>
ATTN_DEVICE void query_gradient(const BackwardArgs& args, Index block_index) {
  using Element = typename M::Element;
  using Shape = BackwardShape<M, kDim, kPlain, true>;
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kThreads = Shape::kThreads;
  constexpr int kMmaM = Shape::kMmaM, kMmaN = Shape::kMmaN, kStep = Shape::kStep;
  const BackwardTiles<M, kDim, kPlain, true> tiles;
  const auto q = tiles.stationary(0), d_out = tiles.stationary(1);

  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const Head head(p, args.factors, args.rows, block_index() / args.rows.tiles);
  // Under a causal mask the last rows see the most: they begin first.
  const auto find_first = [&] { return (args.rows.tiles - 1 - recomputed(block_index()) % args.rows.tiles) * kBlockM; };
  const RowBlock block(head, find_first(), kBlockM);
  const int warp_row = warp_index() * 16 * kMmaM, first_row = block.first + warp_row;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const auto first_again = [&] { return kFindsFirstRow<kDim> ? find_first() : block.first; };
  const auto keys = [&](int first) { return KeyRows<const Element>(p.k, head, first, head.length_k, args.aligned.k); };

  constexpr bool kFused = kPlain && kFuses<M>;
  RowGradients<kMmaM, kFused> rows(args, head, first_row, !sums_delta(M::kMath));
  const auto next = [&](int key) { return kPlain ? key : block.next_shown(head, key, kBlockN); };
  const int begin = next(round_down(block.any.begin, kBlockN));
  if (begin < block.any.end) {
    const int limit = head.rows_in_length();
    load_tile<M, kDim, kBlockM, kThreads>(q, QueryRows<const Element>(p.q, head, block.first, limit, args.aligned.q),
                                          head_dim);
    load_tile<M, kDim, kBlockM, kThreads>(
        d_out, QueryRows<const Element>(b.d_out, head, block.first, limit, args.aligned.d_out), value_dim);
  }
  LeftOperands<M, kDim, kMmaM> kept_q, kept_d_out;
  // use(s, dp, key, sees_all, the tile of keys) for each tile of keys.
  const auto pass = [&](auto use) {
    stream<Shape::kStages, kBlockN>(
        begin, block.any.end, next,
        [&](int key, int stage) {
          load_tile<M, kDim, kBlockN, kThreads>(tiles.streamed(0, stage), keys(key), head_dim);
          const KeyRows<const Element> values(p.v, head, key, head.length_k, args.aligned.v);
          load_tile<M, kDim, kBlockN, kThreads>(tiles.streamed(1, stage), values, value_dim);
        },
        [&] {
          if constexpr (Shape::kKeeps) keep(kept_q, q, kept_d_out, d_out, warp_row);
        },
        [](int, int) {},
        [&](int key, int stage) {
          const bool sees_all = kPlain && block.sees_all(key, kBlockN);
#pragma unroll 1
          for (int step = 0; step < kBlockN; step += kStep) {
            const auto k = tiles.streamed(0, stage).from(step), v = tiles.streamed(1, stage).from(step);
            Acc<kMmaM, kMmaN> s, dp;
            if constexpr (Shape::kKeeps) {
              gemm_nt<M, kDim, kMmaM, kMmaN>(s, kept_q, k);
              gemm_nt<M, kDim, kMmaM, kMmaN>(dp, kept_d_out, v);
            } else {
              gemm_nt<M, kDim, kMmaM, kMmaN>(s, q, warp_row, k);
              gemm_nt<M, kDim, kMmaM, kMmaN>(dp, d_out, warp_row, v);
            }
            use(s, dp, key + step, sees_all, k);
          }
        });
  };
  float factor[kMmaM][2];
#pragma unroll
  for (int m = 0; m < kMmaM; ++m) factor[m][0] = factor[m][1] = args.factors.scale;
  const auto store = [&](const Acc<kMmaM, kDim / 8>& dq, const Head& head) {
    const int first = first_again();
    // Only this warp reads these rows of the query tile (or nobody any more), and it has done so.
    sync_warp();
    write_acc<M, kDim, kMmaM>(q, warp_row, dq, factor);
    sync_warp();
    const QueryRows<Element> target(b.dq, head, first, min(first + kBlockM, args.rows.count), args.aligned.dq);
    store_rows<M, kDim>(q, warp_row, 16 * kMmaM, target, head_dim);
  };
  const auto look_through = [&](const auto& k, bool sees_all) {
    return loses_nonfinite<M>(sees_all) && zero_nonfinite_rows<M, kStep, kThreads>(k, tiles.flags());
  };
  if constexpr (passes_once(M::kMath, kDim, kPlain) && kDim <= kLargestSinglePass) {
    delta_of_output<M, kDim>(rows, args, head, first_row, value_dim);
    SinglePass<M, kDim, kPlain, kMmaM> single;
    pass([&](auto& s, auto& dp, int key, bool sees_all, const auto& k) {
      single.template make<kMmaN>(s, dp, rows, head, first_row, key, sees_all);
      const bool nonfinite = look_through(k, sees_all);
      gemm_nn_pair<M, kDim, kMmaM, kMmaN>(single.dq, single.mean_key, single.rounded, s, dp, k, head_dim);
      if (nonfinite) {
        add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(single.dq, s, tiles.flags(), keys(key), head_dim);
        add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(single.mean_key, dp, tiles.flags(), keys(key), head_dim);
      }
    });
    const Head own = again(head, block_index(), args.rows.tiles);
    single.correct(rows, args, own, first_again() + warp_row);
    store(single.dq, own);
  } else {
    if constexpr (sums_delta(M::kMath)) {
      pass([&](auto& s, auto& dp, int key, bool sees_all, const auto&) {
        add_to_delta<M, kPlain, kMmaM, kMmaN>(rows, s, dp, head, first_row, key, sees_all);
      });
      if (kFused) divide_by_weights(rows, head, first_row);
      finish_delta(rows, args, head, first_row);
    }
    if constexpr (M::kMath == Math::kFloat16) {
#pragma unroll
      for (int m = 0; m < kMmaM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) factor[m][half] *= widen(rows.row[m][half], rows.largest_dp[m][half]);
    }
    Acc<kMmaM, kDim / 8> dq;
    clear<kMmaM, kDim / 8>(dq);
    pass([&](auto& s, auto& dp, int key, bool sees_all, const auto& k) {
      score_gradients<M, kPlain, true, kMmaM, kMmaN>(s, dp, rows, head, first_row, key, sees_all);
      const bool nonfinite = look_through(k, sees_all);
      // All of ds: what keys have in common cancels, however large it is.
      gemm_nn<M, kDim, kMmaM, kMmaN, M::kPartsOfFloat>(dq, s, k, head_dim);
      if (nonfinite) add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(dq, s, tiles.flags(), keys(key), head_dim);
    });
    store(dq, again(head, block_index(), args.rows.tiles));
  }
}

template <class M, int kDim, bool kPlain>
ATTN_DEVICE void query_gradient(const BackwardArgs& args) {
  query_gradient<M, kDim, kPlain>(args, [] { return block_index(); });
}

}  // namespace attn_ops::cuda
