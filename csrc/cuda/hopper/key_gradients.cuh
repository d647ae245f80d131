// dk = scale ds^T q and dv = p^T d_out on Hopper: a block keeps 128 keys and values, all query rows that see any of them
// pass. Scores are computed transposed, keys down, as in ../key_gradients.cuh.
#pragma once

#include "../key_gradients.cuh"
#include "backward.cuh"

namespace attn_ops::cuda::hopper {

// By one lane: the keys and values of the block, and the query rows with their gradients. A tile of rows is of all
// query heads of the group, position by position.
template <int kDim>
ATTN_DEVICE void bring_rows(const BackwardArgs& args, const BackwardMemory<kDim>& memory, const Head& head,
                            int first_key, const Tiles<kPassing<kDim>>& tiles) {
  prefetch(args.q);
  prefetch(args.d_out);
  if (tiles.count == 0) return;
  memory.there().arrive_and_expect(2 * BackwardMemory<kDim>::kConsumers * BackwardMemory<kDim>::Staying::kBytes);
#pragma unroll
  for (int consumer = 0; consumer < BackwardMemory<kDim>::kConsumers; ++consumer) {
    const int key = first_key + kWarpgroupRows * consumer;
    memory.stationary(0, consumer).copy(args.k, head.batch, key, head.kv_head, memory.there());
    memory.stationary(1, consumer).copy(args.v, head.batch, key, head.kv_head, memory.there());
  }
#pragma unroll 1
  for (int i = 0; i < tiles.count; ++i) {
    const Turn<BackwardMemory<kDim>::kStages> turn(i);
    const Barrier full = expect(memory, turn);
    const int position = head.position(tiles.first(i));
    memory.streamed(0, turn.stage).copy(args.q, head.batch, position, head.first_head, full);
    memory.streamed(1, turn.stage).copy(args.d_out, head.batch, position, head.first_head, full);
  }
}

// By one warp, beside it: what is known of those rows.
template <int kDim>
ATTN_DEVICE void tell_rows(const BackwardArgs& args, const BackwardMemory<kDim>& memory, const Head& head,
                           const Tiles<kPassing<kDim>>& tiles) {
  const AttentionParams& p = args.call.b.forward;
  const int limit = head.rows_in_length();
#pragma unroll 1
  for (int i = 0; i < tiles.count; ++i) {
    const Turn<BackwardMemory<kDim>::kStages> turn(i);
    memory.empty(turn.stage).wait(turn.parity ^ 1);
    auto& rows = memory.rows(turn.stage);
    bool fits = true;
#pragma unroll 1
    for (int r = lane_index(); r < kPassing<kDim>; r += 32) {
      const int index = tiles.first(i) + r;
      RowGradient row;
      Interval seen{0, 0};
      if (index < limit) {
        const int position = head.position(index);
        const int64_t statistic = head.statistic(head.head(index, position), position);
        row = RowGradient(p, statistic, args.call.delta[statistic]);
        seen = head.seen_at(position);
      }
      rows.lse_2[r] = row.fused().lse_2;
      rows.delta[r] = row.delta;
      rows.maximum[r] = row.maximum;
      rows.inverse_sum[r] = row.inverse_sum;
      rows.seen[r] = seen;
      fits &= row.fits();
    }
    const bool exact = any_in_warp(!fits);
    if (lane_index() == 0) rows.exact = exact;
    sync_warp();
    if (lane_index() == 0) memory.full(turn.stage).arrive();
  }
}

template <class M, int kDim>
ATTN_DEVICE void compute_dk_dv(const BackwardArgs& args, const BackwardMemory<kDim>& memory, const Head& head,
                               int first_key, const Tiles<kPassing<kDim>>& tiles) {
  using Element = typename M::Element;
  constexpr int kN = kPassing<kDim>, kStages = BackwardMemory<kDim>::kStages;
  const BackwardParams& b = args.call.b;
  const AttentionParams& p = b.forward;
  const float scale = args.call.factors.scale;
  const int consumer = warpgroup_index() - 1, thread = thread_index() % kWarpgroup;
  const int warp_key = 16 * (thread / 32), group_key = first_key + kWarpgroupRows * consumer;
  const int g = lane_index() >> 2, t = lane_index() & 3, own_key = group_key + warp_key + g;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int limit = head.rows_in_length();
  const auto k = memory.stationary(0, consumer), v = memory.stationary(1, consumer);

  Acc<1, kDim / 8> dk, dv;
  clear<1, kDim / 8>(dk);
  clear<1, kDim / 8>(dv);
  Acc<1, kN / 8> s, dp;
  Rounded<kN> weights, gradients;
  if (tiles.count > 0) memory.there().wait(0);
#pragma unroll 1
  for (int i = 0; i < tiles.count; ++i) {
    const Turn<kStages> turn(i);
    const int row = tiles.first(i), stage = turn.stage;
    const auto& rows = memory.rows(stage);
    const bool sees_all = RowBlock(head, row, kN).sees_all(first_key, BackwardMemory<kDim>::kShape.block_m());
    start_scores<M>(s, dp, memory, consumer, turn);
    const bool fused = rows.exact == 0, hides = !sees_all || !fused;
    products_wait<1>();
    arrived(s);
    if (fused) {
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        const auto lse_2 = BackwardMemory<kDim>::Rows::pair(rows.lse_2, n, t);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[0][n][i] = fused_weight(s[0][n][i], scale, lse_2.of[i & 1]);
      }
    } else {
      for_each_score<kN>([&](int n, int i) {
        const int row = 8 * n + 2 * t + (i & 1);
        s[0][n][i] = exact_probability(s[0][n][i], scale, rows.maximum[row], rows.inverse_sum[row]);
      });
    }
    if (!sees_all) {
      for_each_score<kN>([&](int n, int i) {
        const Interval seen = rows.seen[8 * n + 2 * t + (i & 1)];
        const int key = own_key + 8 * (i >> 1);
        if (key < seen.begin || key >= seen.end) s[0][n][i] = float_of(kHiddenBits);
      });
    }
    round_acc<M, kN>(weights, s);
    products_wait<0>();
    arrived(dp);
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      const auto delta = BackwardMemory<kDim>::Rows::pair(rows.delta, n, t);
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[0][n][i] = s[0][n][i] * (dp[0][n][i] - delta.of[i & 1]);
    }
    if (hides) hide_gradients<kN>(dp, s);
    round_acc<M, kN>(gradients, dp);
    bool nonfinite[2] = {false, false};
    if (hides) {
#pragma unroll
      for (int which = 0; which < 2; ++which) nonfinite[which] = look_through<M>(memory, which, stage);
    }
    products_begin();
    start_nn<M, kDim, kN>(dv, weights, memory.streamed(1, stage));
    start_nn<M, kDim, kN>(dk, gradients, memory.streamed(0, stage));
    products_wait<0>();
    arrived(dv);
    arrived(dk);
    if (nonfinite[0]) {
      const QueryRows<const Element> queries(p.q, head, row, limit, 16);
      add_nonfinite_rows<M, kDim, kN>(dk, gradients, memory.flags(0), queries, head_dim);
    }
    if (nonfinite[1]) {
      const QueryRows<const Element> d_outs(b.d_out, head, row, limit, 16);
      add_nonfinite_rows<M, kDim, kN>(dv, weights, memory.flags(1), d_outs, value_dim);
    }
    release(memory.empty(stage));
  }

  // The warpgroup is done with its keys and values: their place takes the results.
  sync_some(kOfConsumer + consumer, kWarpgroup);
  const auto keys_of = [&](const StridedView& view, int aligned) {
    return KeyRows<Element>(view, head, group_key, static_cast<int>(p.seqlen_k), aligned);
  };
  const float of_dk[1][2] = {{scale, scale}}, of_dv[1][2] = {{1.0f, 1.0f}};
  store_results<M>(k, warp_key, dk, of_dk, keys_of(b.dk, args.call.aligned.dk), head_dim);
  store_results<M>(v, warp_key, dv, of_dv, keys_of(b.dv, args.call.aligned.dv), value_dim);
}

template <class M, int kDim>
ATTN_DEVICE void key_gradients(const BackwardArgs& args) {
  constexpr Shape kShape = backward_shape(kDim, true);
  const BackwardMemory<kDim> memory;
  memory.init(2);
  const Rows& rows = args.call.rows;
  const Head head(args.call.b.forward, args.call.factors, rows, block_index() / rows.tiles);
  const int first_key = block_index() % rows.tiles * kShape.block_m();
  const Interval seeing = rows_that_see(head, first_key, kShape.block_m());
  const Tiles<kPassing<kDim>> tiles(seeing.begin, seeing.end);
  if (warpgroup_index() == 0) {
    keep_registers<kShape.producer>();
    if (thread_index() == 0) bring_rows(args, memory, head, first_key, tiles);
    if (warp_index() == 1) tell_rows(args, memory, head, tiles);
  } else {
    take_registers<kShape.consumer>();
    compute_dk_dv<M>(args, memory, head, first_key, tiles);
  }
}

}  // namespace attn_ops::cuda::hopper
