// dq on Hopper: a block keeps 128 query rows and their gradients of the output, all their keys and values pass, once.
//
// The sum of a row's ds is d_lse: what all keys have in common cancels in dq, however large it is, and must do so in 16
// bits too. But delta = rowsum(d_out * out) has the rounding of out, ds that of an element. Both leave
//
//   sum_j ds_j = d_lse + t      and in dq   t times what keys have in common, of which the weighted mean of the keys is
//
//   kbar = sum_j p_j k_j / sum_j p_j          dq = scale (sum_j ds_j k_j - t kbar)
//
// an estimate that is exact for a wrong delta, and for rounding up to how keys differ, for one product more
// (../query_gradient.cuh has it for calls of all kinds).
// The exact delta, which dk and dv need, is the sum of p dp over those keys.
#pragma once

#include "../delta.cuh"
#include "backward.cuh"

namespace attn_ops::cuda::hopper {

template <int kDim>
ATTN_DEVICE void bring_keys(const BackwardArgs& args, const BackwardMemory<kDim>& memory, const Head& head,
                            const Tiles<kPassing<kDim>>& tiles) {
  prefetch(args.k);
  prefetch(args.v);
#pragma unroll 1
  for (int i = 0; i < tiles.count; ++i) {
    const Turn<BackwardMemory<kDim>::kStages> turn(i);
    const Barrier full = expect(memory, turn);
    memory.streamed(0, turn.stage).copy(args.k, head.batch, tiles.first(i), head.kv_head, full);
    memory.streamed(1, turn.stage).copy(args.v, head.batch, tiles.first(i), head.kv_head, full);
  }
}

// What a lane knows of its two rows.
struct QueryRow {
  float lse_2 = 0.0f, maximum = 0.0f, inverse_sum = 0.0f, delta = 0.0f, d_lse = 0.0f;
  float sum_p_dp = 0.0f, sum_rounded_ds = 0.0f, sum_rounded_p = 0.0f;
};

// Adds what a lane has of its two rows, as it was rounded.
template <class M, int kN>
ATTN_DEVICE void add_rounded(const Rounded<kN>& x, float& first, float& second) {
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < kN / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i & 1] += M::low(x[k][i]) + M::high(x[k][i]);
  first += sum[0];
  second += sum[1];
}

template <class M, int kDim>
ATTN_DEVICE void compute_dq(const BackwardArgs& args, const BackwardMemory<kDim>& memory, const Head& head,
                            const RowBlock& block, const Tiles<kPassing<kDim>>& tiles) {
  using Element = typename M::Element;
  constexpr int kN = kPassing<kDim>, kStages = BackwardMemory<kDim>::kStages;
  const BackwardParams& b = args.call.b;
  const AttentionParams& p = b.forward;
  const float scale = args.call.factors.scale;
  const int consumer = warpgroup_index() - 1, thread = thread_index() % kWarpgroup;
  const int warp_row = 16 * (thread / 32), group_row = block.first + kWarpgroupRows * consumer;
  const int first_row = group_row + warp_row, g = lane_index() >> 2;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const auto q = memory.stationary(0, consumer), d_out = memory.stationary(1, consumer);

  const int limit = head.rows_in_length();
  load_rows(q, QueryRows<const Element>(p.q, head, group_row, limit, 16), head_dim, thread);
  load_rows(d_out, QueryRows<const Element>(b.d_out, head, group_row, limit, 16), value_dim, thread);
  copy_async_commit();
  const QueryRows<const Element> outs(p.out, head, first_row, limit, 16);
  const QueryRows<const Element> d_outs(b.d_out, head, first_row, limit, 16);
  QueryRow row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) row[half].delta = output_product<M, kDim>(outs, d_outs, 8 * half + g, value_dim);
  bool fits = true;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int index = first_row + 8 * half + g;
    QueryRow& own = row[half];
    if (index < limit) {
      const int position = head.position(index);
      const int64_t statistic = head.statistic(head.head(index, position), position);
      const RowGradient known(p, statistic, 0.0f);
      own.maximum = known.maximum;
      own.inverse_sum = known.inverse_sum;
      if (b.d_lse != nullptr) own.d_lse = static_cast<const float*>(b.d_lse)[statistic];
      own.delta -= own.d_lse;
    }
    own.lse_2 = RowGradient::lse_2(own.maximum, own.inverse_sum);
    fits &= fits_fused(own.maximum);
  }
  const bool fused = !sync_some_or(kOfConsumers, BackwardMemory<kDim>::kConsumers * kWarpgroup, !fits);
  copy_async_wait<0>();
  fence_writes();
  sync_some(kOfConsumer + consumer, kWarpgroup);

  Acc<1, kDim / 8> dq, mean_key;
  clear<1, kDim / 8>(dq);
  clear<1, kDim / 8>(mean_key);
  Acc<1, kN / 8> s, dp;
  Rounded<kN> weights, gradients;
#pragma unroll 1
  for (int i = 0; i < tiles.count; ++i) {
    const Turn<kStages> turn(i);
    const int key = tiles.first(i), stage = turn.stage;
    const bool sees_all = block.sees_all(key, kN), hides = !sees_all || !fused;
    start_scores<M>(s, dp, memory, consumer, turn);
    products_wait<1>();
    arrived(s);
    if (fused) {
      for_each_score<kN>([&](int n, int i) { s[0][n][i] = fused_weight(s[0][n][i], scale, row[i >> 1].lse_2); });
    } else {
      for_each_score<kN>([&](int n, int i) {
        s[0][n][i] = exact_probability(s[0][n][i], scale, row[i >> 1].maximum, row[i >> 1].inverse_sum);
      });
    }
    if (!sees_all) {
      const Interval seen[2] = {head.seen(first_row + g), head.seen(first_row + 8 + g)};
      const int first = key + 2 * (lane_index() & 3);
      for_each_score<kN>([&](int n, int i) {
        const int own = first + 8 * n + (i & 1);
        if (own < seen[i >> 1].begin || own >= seen[i >> 1].end) s[0][n][i] = float_of(kHiddenBits);
      });
    }
    round_acc<M, kN>(weights, s);
    add_rounded<M, kN>(weights, row[0].sum_rounded_p, row[1].sum_rounded_p);
    products_wait<0>();
    arrived(dp);
    if (hides) {  // of what is hidden, dp is nothing, even if it is not finite
      for_each_score<kN>([&](int n, int i) {
        if (is_hidden(s[0][n][i])) dp[0][n][i] = 0.0f;
      });
    }
    float sum[2] = {0.0f, 0.0f};
    for_each_score<kN>([&](int n, int i) {
      const float x = s[0][n][i], d = dp[0][n][i];
      sum[i >> 1] += x * d;
      dp[0][n][i] = x * (d - row[i >> 1].delta);
    });
    row[0].sum_p_dp += sum[0];
    row[1].sum_p_dp += sum[1];
    if (hides) hide_gradients<kN>(dp, s);
    round_acc<M, kN>(gradients, dp);
    add_rounded<M, kN>(gradients, row[0].sum_rounded_ds, row[1].sum_rounded_ds);
    const bool nonfinite = hides && look_through<M>(memory, 0, stage);
    products_begin();
    start_nn<M, kDim, kN>(dq, gradients, memory.streamed(0, stage));
    start_nn<M, kDim, kN>(mean_key, weights, memory.streamed(0, stage));
    products_wait<0>();
    arrived(dq);
    arrived(mean_key);
    if (nonfinite) {
      const KeyRows<const Element> keys(p.k, head, key, head.length_k, 16);
      add_nonfinite_rows<M, kDim, kN>(dq, gradients, memory.flags(0), keys, head_dim);
      add_nonfinite_rows<M, kDim, kN>(mean_key, weights, memory.flags(0), keys, head_dim);
    }
    release(memory.empty(stage));
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    QueryRow& own = row[half];
    sum_of_quad(own.sum_p_dp);
    sum_of_quad(own.sum_rounded_ds);
    sum_of_quad(own.sum_rounded_p);
    const float excess = own.sum_rounded_ds - own.d_lse;
    const float share = own.sum_rounded_p > 0.0f ? excess / own.sum_rounded_p : 0.0f;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int j = 2 * half; j < 2 * half + 2; ++j) dq[0][n][j] -= share * mean_key[0][n][j];
    const int index = first_row + 8 * half + g;
    if ((lane_index() & 3) != 0 || index >= limit) continue;
    const int position = head.position(index);
    args.call.delta[head.statistic(head.head(index, position), position)] = own.sum_p_dp - own.d_lse;
  }
  const float factor[1][2] = {{scale, scale}};
  // The warpgroup is done with its queries: their place takes the results.
  sync_some(kOfConsumer + consumer, kWarpgroup);
  store_results<M>(q, warp_row, dq, factor, QueryRows<Element>(b.dq, head, group_row, block.end, args.call.aligned.dq),
                   head_dim);
}

template <class M, int kDim>
ATTN_DEVICE void query_gradient(const BackwardArgs& args) {
  constexpr Shape kShape = backward_shape(kDim, false);
  const BackwardMemory<kDim> memory;
  memory.init(1);
  const Rows& rows = args.call.rows;
  const Head head(args.call.b.forward, args.call.factors, rows, block_index() / rows.tiles);
  // Under a causal mask the last rows see the most: they begin first.
  const int tile = rows.tiles - 1 - block_index() % rows.tiles;
  const RowBlock block(head, tile * kShape.block_m(), kShape.block_m());
  const Tiles<kPassing<kDim>> tiles(block.any.begin, block.any.end);
  if (warpgroup_index() == 0) {
    keep_registers<kShape.producer>();
    if (thread_index() == 0) bring_keys(args, memory, head, tiles);
  } else {
    take_registers<kShape.consumer>();
    compute_dq<M>(args, memory, head, block, tiles);
  }
}

}  // namespace attn_ops::cuda::hopper
