// Forward on Hopper, of the plain calls (an interval of keys per row, scale > 0) in 16 bits:
//
//   s = scale q k^T    m' = max(m, s)    p = e^(s - m')    l = e^(m - m') l + sum p    o = e^(m - m') o + p v
//
// A block keeps 128 query rows. One warpgroup has the copy engine bring keys and values; two compute, 64 rows each. A
// warpgroup's tensor cores work on the scores of a tile and the values of the one before, while its other units are at
// the softmax between: and the two take turns, so that while one is there the other's products run (FlashAttention-3,
// Shah et al. 2024).
#pragma once

#include "../forward.cuh"
#include "finite.cuh"

namespace attn_ops::cuda::hopper {

template <int kDim>
struct ForwardMemory {
  static constexpr Shape kShape = forward_shape(kDim);
  static constexpr int kStages = kShape.stages;
  using Queries = PanelTile<kWarpgroupRows, kDim>;
  using Keys = PanelTile<kShape.block_n, kDim>;

  char* base = panel_memory();

  ATTN_DEVICE Queries q(int consumer) const { return {base + consumer * Queries::kBytes}; }
  ATTN_DEVICE Keys k(int stage) const { return {base + kShape.consumers * Queries::kBytes + stage * Keys::kBytes}; }
  ATTN_DEVICE Keys v(int stage) const { return k(kStages + stage); }
  ATTN_DEVICE char* rest() const { return k(2 * kStages).data; }
  // Of the keys (0) or the values (1) of a stage: whether they are there, whether all are done with them.
  ATTN_DEVICE Barrier full(int which, int stage) const {
    return {reinterpret_cast<uint64_t*>(rest()) + which * kStages + stage};
  }
  ATTN_DEVICE Barrier empty(int which, int stage) const { return {full(2 + which, stage)}; }
  ATTN_DEVICE Flags flags() const { return reinterpret_cast<Flags>(rest() + 256); }
};

// The keys of a tile are needed before the values of the one before it.
template <int kDim>
ATTN_DEVICE void produce(const ForwardArgs& args, const ForwardMemory<kDim>& memory, const Head& head,
                         const Tiles<ForwardMemory<kDim>::kShape.block_n>& tiles) {
  constexpr int kStages = ForwardMemory<kDim>::kStages;
  const auto bring = [&](int which, int i) {
    const Turn<kStages> turn(i);
    memory.empty(which, turn.stage).wait(turn.parity ^ 1);
    const Barrier full = memory.full(which, turn.stage);
    full.arrive_and_expect(ForwardMemory<kDim>::Keys::kBytes);
    const auto tile = which == 0 ? memory.k(turn.stage) : memory.v(turn.stage);
    tile.copy(which == 0 ? args.k : args.v, head.batch, tiles.first(i), head.kv_head, full);
  };
  prefetch(args.k);
  prefetch(args.v);
  if (tiles.count > 0) bring(0, 0);
#pragma unroll 1
  for (int i = 0; i < tiles.count; ++i) {
    if (i + 1 < tiles.count) bring(0, i + 1);
    bring(1, i);
  }
}

template <class M, int kDim>
ATTN_DEVICE void consume(const ForwardArgs& args, const ForwardMemory<kDim>& memory, const Head& head,
                         const RowBlock& block, const Tiles<ForwardMemory<kDim>::kShape.block_n>& tiles) {
  using Element = typename M::Element;
  constexpr Shape kShape = forward_shape(kDim);
  constexpr int kN = kShape.block_n, kStages = kShape.stages;
  const AttentionParams& p = args.call.p;
  const float scale = args.call.factors.scale;
  const int consumer = warpgroup_index() - 1, thread = thread_index() % kWarpgroup;
  const int warp_row = 16 * (thread / 32), group_row = block.first + kWarpgroupRows * consumer;
  const int first_row = group_row + warp_row;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const auto q = memory.q(consumer);

  // Queries that see nothing are not read.
  const QueryRows<const Element> queries(p.q, head, group_row, head.rows_in_length(), 16);
  load_rows(q, queries, head_dim, thread);
  copy_async_commit();
  copy_async_wait<0>();
  fence_writes();
  sync_some(kOfConsumer + consumer, kWarpgroup);

  Acc<1, kDim / 8> o;
  clear<1, kDim / 8>(o);
  RowStatistics<M, 1> rows;
  Acc<1, kN / 8> s;
  Rounded<kN> weights;
  float factor[1][2];  // what the results before a tile are multiplied with, if they are
  bool rescales = false, nonfinite = false;

  const auto start_scores = [&](int i) {
    const Turn<kStages> turn(i);
    memory.full(0, turn.stage).wait(turn.parity);
    products_begin();
    start_nt<M, kDim>(s, q, memory.k(turn.stage));
  };
  const auto softmax = [&](int i) {
    rescales = false;
    const auto rescale = [&](const float (&by)[1][2]) {
      rescales = true;
      factor[0][0] = by[0][0], factor[0][1] = by[0][1];
    };
    if (block.sees_all(tiles.first(i), kN)) {
      softmax_of_all<M, 1, kN / 8>(s, rows, scale, rescale);
    } else {
      softmax_of_some<M, true, 1, kN / 8>(s, rows, head, first_row, tiles.first(i), rescale);
    }
  };
  // Of values that not every row sees, before they are multiplied with.
  const auto look_through = [&](int i) {
    if (block.sees_all(tiles.first(i), kN)) return;
    const Turn<kStages> turn(i);
    memory.full(1, turn.stage).wait(turn.parity);
    nonfinite = zero_nonfinite_rows<M, kShape.consumers>(memory.v(turn.stage), memory.flags());
  };
  const auto start_values = [&](int i) {
    const Turn<kStages> turn(i);
    memory.full(1, turn.stage).wait(turn.parity);
    products_begin();
    start_nn<M, kDim, kN>(o, weights, memory.v(turn.stage));
  };
  const auto finish_values = [&](int i) {
    products_wait<0>();
    arrived(o);
    if (nonfinite) {
      const KeyRows<const Element> values(p.v, head, tiles.first(i), head.length_k, 16);
      add_nonfinite_rows<M, kDim, kN>(o, weights, memory.flags(), values, value_dim);
      nonfinite = false;
    }
    release(memory.empty(1, Turn<kStages>(i).stage));
  };

  // A turn begins when the one before has ended: two warpgroups meet at its barrier.
  const int next = consumer + 1 == kShape.consumers ? 0 : consumer + 1;
  if (next == 0) arrive_at(kTurns, 2 * kWarpgroup);
  const auto turn_begins = [&] { sync_some(kTurns + consumer, 2 * kWarpgroup); };
  const auto turn_ends = [&] { arrive_at(kTurns + next, 2 * kWarpgroup); };
  if (tiles.count > 0) {
    turn_begins();
    start_scores(0);
    turn_ends();
    products_wait<0>();
    arrived(s);
    release(memory.empty(0, 0));
    softmax(0);
    round_acc<M, kN>(weights, s);
#pragma unroll 1
    for (int i = 1; i < tiles.count; ++i) {
      look_through(i - 1);
      turn_begins();
      start_scores(i);
      start_values(i - 1);
      turn_ends();
      products_wait<1>();
      arrived(s);
      release(memory.empty(0, Turn<kStages>(i).stage));
      softmax(i);
      finish_values(i - 1);
      if (rescales) scale_rows<1, kDim / 8>(o, factor);
      round_acc<M, kN>(weights, s);
    }
    look_through(tiles.count - 1);
    start_values(tiles.count - 1);
    finish_values(tiles.count - 1);
  }

  const auto finished = rows.finish();
  const int g = lane_index() >> 2;
  float inverse[1][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = rows.sum[0][half];
    inverse[0][half] = sum == 0.0f ? 0.0f : finished.of[0][half] / sum;
    const int row = first_row + 8 * half + g;
    if ((lane_index() & 3) != 0 || row >= block.end) continue;
    const int position = head.position(row);
    write_statistics(p, head.statistic(head.head(row, position), position), rows.maximum[0][half], sum);
  }
  // The warpgroup is done with its queries: their place takes the results.
  sync_some(kOfConsumer + consumer, kWarpgroup);
  store_results<M>(q, warp_row, o, inverse,
                   QueryRows<Element>(p.out, head, group_row, block.end, args.call.aligned.out), value_dim);
}

template <class M, int kDim>
ATTN_DEVICE void forward(const ForwardArgs& args) {
  const ForwardMemory<kDim> memory;
  constexpr Shape kShape = forward_shape(kDim);
  if (thread_index() == 0) {
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
      for (int stage = 0; stage < kShape.stages; ++stage) {
        memory.full(which, stage).init(1);
        memory.empty(which, stage).init(4 * kShape.consumers);
      }
    fence_barriers();
  }
  sync_block();

  const Rows& rows = args.call.rows;
  const Head head(args.call.p, args.call.factors, rows, block_index() / rows.tiles);
  // Under a causal mask the last rows see the most: they begin first.
  const int tile = rows.tiles - 1 - block_index() % rows.tiles;
  const RowBlock block(head, tile * kShape.block_m(), kShape.block_m());
  const Tiles<kShape.block_n> tiles(block.any.begin, block.any.end);
  if (warpgroup_index() == 0) {
    keep_registers<kShape.producer>();
    if (thread_index() == 0) produce(args, memory, head, tiles);
  } else {
    take_registers<kShape.consumer>();
    consume<M>(args, memory, head, block, tiles);
  }
}

}  // namespace attn_ops::cuda::hopper
