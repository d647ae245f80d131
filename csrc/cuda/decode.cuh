// Few query rows and many keys (a decode step): what counts is to read keys and values at the speed of the memory.
//
// The rows of a key/value head's whole group fill one 16-row tile, each warp streams keys of its own through a ring of
// tiles with the softmax of its own, and no barrier stands in the stream. The warps' results are put together at the
// end,
//
//   m = max m_i      l = sum e^(m_i - m) l_i      out = sum e^(m_i - m) o_i / l
//
// and likewise the parts of blocks that share the keys of a head, by the last of them to finish.
//
// Keys may lie in pages: a tile is of one page, whose place in memory is looked up when the tile is asked for.
#pragma once

#include "forward.cuh"

namespace attn_ops::cuda {

// Whether this block is the last of `parts` to arrive. `ticket` may hold anything before the launch: a count is only
// believed beside the launch's own number. The last one leaves it zero for the next launch (a replayed graph has the
// same number).
ATTN_DEVICE bool arrives_last(uint64_t* ticket, uint64_t launch, int parts) {
  uint64_t found = launch << 16, expected;
  int arrived;
  do {
    expected = found;
    arrived = expected >> 16 == launch ? static_cast<int>(expected & 0xffff) : 0;
    const bool last = arrived + 1 == parts;
    found = compare_and_swap(ticket, expected, last ? 0 : launch << 16 | static_cast<uint64_t>(arrived + 1));
  } while (found != expected);
  return arrived + 1 == parts;
}

// Weights e^(m_i - m) of parts, whose maxima are maximum(i); the sum over them is sum(i).
struct Merged {
  float maximum, sum;

  template <class Maximum, class Sum>
  ATTN_DEVICE Merged(int parts, Maximum maximum_of, Sum sum_of) : maximum(minus_infinity()), sum(0.0f) {
#pragma unroll 4
    for (int i = 0; i < parts; ++i) maximum = fmaxf(maximum, maximum_of(i));
#pragma unroll 4
    for (int i = 0; i < parts; ++i) sum += weight(maximum_of(i)) * sum_of(i);
  }
  ATTN_DEVICE float weight(float part_maximum) const {
    return part_maximum == maximum ? 1.0f : exponential(part_maximum - maximum);
  }
};

template <class M, int kDim>
ATTN_DEVICE void decode(const DecodeArgs& args) {
  using Element = typename M::Element;
  using T = SharedTile<M, kDim>;
  constexpr int kKeys = decode_keys(M::kMath), kMmaN = kKeys / 8, kRing = decode_ring(M::kMath, kDim);
  constexpr int kTileBytes = decode_tile_bytes(kDim);
  const T q{shared_memory()};
  char* rings = q.data + decode_query_bytes(M::kMath, kDim);
  char* ring = rings + warp_index() * kRing * kTileBytes;
  float* statistics = reinterpret_cast<float*>(rings + kDecodeWarps * kRing * kTileBytes);  // [warp][row][maximum, sum]
  const Flags flags = reinterpret_cast<Flags>(statistics + kDecodeWarps * kDecodeRows * 2) + warp_index() * kKeys;

  const AttentionParams& p = args.p;
  const int split = block_index() % args.splits;
  const int part_of = block_index() / args.splits;  // the tile, among those of all heads
  const Head head(p, args.factors, args.rows, part_of / args.rows.tiles);
  const RowBlock block(head, part_of % args.rows.tiles * kDecodeRows, kDecodeRows);
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const float scale = args.factors.scale;
  // In float32, values are looked through in any case: infinities do not survive 3xTF32.
  const bool plain = M::kMmaK == 16 && p.bias.data == nullptr && p.num_masks == 0 && args.factors.drop_below == 0 &&
                     scale > 0 && scale <= 1;

  // The block's share of the keys, in steps of one tile for each warp.
  constexpr int kStepKeys = kDecodeWarps * kKeys;
  const int begin = round_down(block.any.begin, kKeys);
  const int steps = max((block.any.end - begin + kStepKeys - 1) / kStepKeys, 0);
  const int steps_each = (steps + args.splits - 1) / args.splits;
  const int first_step = min(split * steps_each, steps), own_steps = min(steps_each, steps - first_step);
  const auto first_key = [&](int step) { return begin + (first_step + step) * kStepKeys + warp_index() * kKeys; };
  const auto values = [&](int step) {
    return KeyRows<const Element>::of_tile(p.v, head, first_key(step), head.length_k, args.aligned.v);
  };
  const auto slot = [&](int item) { return T{ring + item % kRing * kTileBytes}; };
  // Item 2 i is the keys of step i, item 2 i + 1 its values.
  const auto fetch = [&](int item) {
    if (item < 2 * own_steps) {
      if (item & 1) {
        load_tile<M, kDim, kKeys, 32, Warp>(slot(item), values(item >> 1), value_dim);
      } else {
        const int key = first_key(item >> 1);
        const auto keys = KeyRows<const Element>::of_tile(p.k, head, key, head.length_k, args.aligned.k);
        load_tile<M, kDim, kKeys, 32, Warp>(slot(item), keys, head_dim);
      }
    }
    copy_async_commit();
  };

  if (own_steps > 0) {
    const QueryRows<const Element> queries(p.q, head, block.first, head.rows_in_length(), args.aligned.q);
    load_tile<M, kDim, kDecodeRows, 32 * kDecodeWarps>(q, queries, head_dim);
  }
#pragma unroll 1
  for (int item = 0; item < kRing - 1; ++item) fetch(item);  // the queries belong to the first
  copy_async_wait<kRing - 2>();
  sync_block();

  Acc<1, kDim / 8> o;
  clear<1, kDim / 8>(o);
  const auto rescale = [&o](int m, int half, float factor) { scale_row<1, kDim / 8>(o, m, half, factor); };
  RowStatistics<1> rows;
#pragma unroll 1
  for (int step = 0; step < own_steps; ++step) {
    const int key = first_key(step);
    copy_async_wait<kRing - 2>();
    sync_warp();  // the keys are here for all lanes, and all are done with the values of the step before
    fetch(2 * step + kRing - 1);
    Acc<1, kMmaN> s;
    gemm_nt<M, kDim, 1, kMmaN>(s, q, 0, slot(2 * step), recomputed(lane_index()));
    const bool sees_all = plain && block.sees_all(key, kKeys);
    if (sees_all) {
      softmax_of_all<1, kMmaN>(s, rows, scale, rescale);
    } else {
      softmax_of_some<M, false, 1, kMmaN>(s, rows, head, block.first, key, rescale);
    }
    copy_async_wait<kRing - 2>();
    sync_warp();  // the same for the values, and the keys
    fetch(2 * step + kRing);
    const T v = slot(2 * step + 1);
    const bool nonfinite = !sees_all && zero_nonfinite_rows<M, kDim, kKeys, 32, Warp>(v, flags);
    gemm_nn<M, kDim, 1, kMmaN>(o, s, v, value_dim, recomputed(lane_index()));
    if (nonfinite) add_nonfinite_rows<M, kDim, 1, kMmaN>(o, s, flags, values(step), value_dim);
  }
  copy_async_wait<0>();
  rows.finish();

  // Each warp's sums become a table of floats in its own ring.
  const int g = lane_index() >> 2, t = lane_index() & 3;
  sync_warp();
  float* table = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + g;
    if (t == 0) {
      statistics[(warp_index() * kDecodeRows + row) * 2] = rows.maximum[0][half];
      statistics[(warp_index() * kDecodeRows + row) * 2 + 1] = rows.sum[0][half];
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      table[row * kDim + 8 * n + 2 * t] = o[0][n][2 * half];
      table[row * kDim + 8 * n + 2 * t + 1] = o[0][n][2 * half + 1];
    }
  }
  sync_block();

  const QueryRows<Element> out(p.out, head, block.first, block.end, args.aligned.out);
  const auto finish = [&](int row, int d, const Merged& merged, float sum) {
    if (d < value_dim) {
      out.row(row)[d * out.dim_stride] =
          M::from_float(merged.sum == 0.0f ? 0.0f : args.factors.keep * sum / merged.sum);
    }
    if (d > 0) return;
    const int position = head.position(block.first + row);
    write_statistics(p, head.statistic(head.head(block.first + row, position), position), merged.maximum, merged.sum);
  };
  const int own_rows = block.end - block.first;
  const int columns = max(value_dim, 1);  // one even without values, for the statistics
  const auto for_each = [&](auto body) {
#pragma unroll 1
    for (int i = thread_index(); i < own_rows * columns; i += 32 * kDecodeWarps) body(i / columns, i % columns);
  };
  const int64_t first_part = int64_t{part_of} * args.splits;
  for_each([&](int row, int d) {
    const auto maximum = [&](int warp) { return statistics[(warp * kDecodeRows + row) * 2]; };
    const Merged merged(kDecodeWarps, maximum,
                        [&](int warp) { return statistics[(warp * kDecodeRows + row) * 2 + 1]; });
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      const float* other = reinterpret_cast<const float*>(rings + warp * kRing * kTileBytes);
      sum += merged.weight(maximum(warp)) * other[row * kDim + d];
    }
    if (args.splits == 1) {
      finish(row, d, merged, sum);
      return;
    }
    const int64_t line = (first_part + split) * kDecodeRows + row;
    if (d < value_dim) args.partial_out[line * value_dim + d] = sum;
    if (d == 0) args.partial_stats[2 * line] = merged.maximum, args.partial_stats[2 * line + 1] = merged.sum;
  });
  if (args.splits == 1) return;

  fence_device();
  sync_block();
  if (sync_block_or(thread_index() == 0 && arrives_last(args.tickets + part_of, args.launch, args.splits))) {
    fence_device();
    for_each([&](int row, int d) {
      const float* stats = args.partial_stats + 2 * (first_part * kDecodeRows + row);
      const auto maximum = [&](int part) { return stats[2 * kDecodeRows * part]; };
      const Merged merged(args.splits, maximum, [&](int part) { return stats[2 * kDecodeRows * part + 1]; });
      float sum = 0.0f;
      if (d < value_dim) {
        const float* parts = args.partial_out + (first_part * kDecodeRows + row) * value_dim + d;
#pragma unroll 4
        for (int part = 0; part < args.splits; ++part) {
          sum += merged.weight(maximum(part)) * parts[static_cast<int64_t>(part) * kDecodeRows * value_dim];
        }
      }
      finish(row, d, merged, sum);
    });
  }
}

}  // namespace attn_ops::cuda
