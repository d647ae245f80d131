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

// Of [rows][parts] pairs of a maximum m_i and a sum l_i, in shared memory, weights e^(m_i - m) take the places of m_i,
// and m and sum e^(m_i - m) l_i of each row go to `merged`, [rows][2]. A warp does a row at a time.
ATTN_DEVICE void merge_statistics(float* statistics, int rows, int parts, float* merged) {
#pragma unroll 1
  for (int row = warp_index(); row < rows; row += kDecodeWarps) {
    float* own = statistics + 2 * row * parts;
    float maximum = minus_infinity(), sum = 0.0f;
#pragma unroll 1
    for (int i = lane_index(); i < parts; i += 32) maximum = fmaxf(maximum, own[2 * i]);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) maximum = fmaxf(maximum, shuffle_xor(maximum, mask));
#pragma unroll 1
    for (int i = lane_index(); i < parts; i += 32) {
      const float weight = own[2 * i] == maximum ? 1.0f : exponential(own[2 * i] - maximum);
      own[2 * i] = weight;
      sum += weight * own[2 * i + 1];
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() == 0) merged[2 * row] = maximum, merged[2 * row + 1] = sum;
  }
}

// Four columns of a row.
struct Quad {
  float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};

  ATTN_DEVICE void add(float weight, Bytes16 other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] += weight * float_of(other.word[i]);
  }
  ATTN_DEVICE Bytes16 bytes() const { return {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}}; }
};

// What the blocks of a tile's parts have left becomes its output, by finish(row, column, sum): the statistics are
// fetched all at a time, then sums in batches, so that many loads are under way and few wait for others. `memory` is
// shared, kCombineBytes.
constexpr int kCombineStatisticsBytes = kDecodeRows * kMostSplits * 8;
constexpr int kCombineBytes = kCombineStatisticsBytes + 16 * 32 * kDecodeWarps;

template <class Finish>
ATTN_DEVICE void combine_parts(const DecodeArgs& args, int64_t first_part, int rows, int quads, char* memory,
                               float* merged, Finish finish) {
  constexpr int kThreads = 32 * kDecodeWarps, kBatch = 16;
  float* statistics = reinterpret_cast<float*>(memory);  // [row][part][maximum, sum]
#pragma unroll 1
  for (int i = thread_index(); i < rows * args.splits; i += kThreads) {
    const int row = i / args.splits, part = i % args.splits;
    copy_async_few<8>(statistics + 2 * i, args.partial_stats + 2 * ((first_part + part) * kDecodeRows + row), true);
  }
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();
  merge_statistics(statistics, rows, args.splits, merged);
  sync_block();

  // Where there are more threads than quads, each has a share of the parts.
  const int items = rows * quads, shares = max(kThreads / items, 1);
  Bytes16* sums = reinterpret_cast<Bytes16*>(memory + kCombineStatisticsBytes);  // of each thread
  const int64_t step = int64_t{shares} * kDecodeRows * quads;
#pragma unroll 1
  for (int first = 0; first < items; first += kThreads) {
    const int i = first + thread_index(), share = i / items, item = i % items;
    const int row = item / quads, column = item % quads * 4;
    const Bytes16* source = reinterpret_cast<const Bytes16*>(args.partial_out) +
                            ((first_part + share) * kDecodeRows + row) * quads + column / 4;
    const float* weight = statistics + 2 * (row * args.splits + share);
    Quad sum;
#pragma unroll 1
    for (int part = share < shares ? share : args.splits; part < args.splits;) {
      Bytes16 batch[kBatch];
      float weights[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n, part += shares, source += step, weight += 2 * shares) {
        const bool exists = part < args.splits;
        batch[n] = exists ? *source : Bytes16{{0, 0, 0, 0}};
        weights[n] = exists ? *weight : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) sum.add(weights[n], batch[n]);
    }
    if (shares > 1) {  // and so all items at a time
      sums[thread_index()] = sum.bytes();
      sync_block();
      for (int other = 1; other < shares && share == 0; ++other) sum.add(1.0f, sums[other * items + item]);
    }
    if (share == 0) finish(row, column, sum);
  }
}

// A warp's output as a table of floats, [kDecodeRows][kDim]: groups of eight columns change places, so that the rows
// that are written at a time lie on different banks.
template <int kDim>
ATTN_DEVICE float* table_place(char* table, int row, int column) {
  return reinterpret_cast<float*>(table) + row * kDim + (column ^ (row & 3) << 3);
}

// Of kRows rows of 16 bits the same in float32, by the lanes of a warp.
template <class M, class Kept, int kDim, int kRows>
ATTN_DEVICE void widen(const SharedTile<M, kDim>& wide, const SharedTile<Kept, kDim>& kept) {
  constexpr int kChunks = SharedTile<Kept, kDim>::kChunks;
#pragma unroll
  for (int i = lane_index(); i < kRows * kChunks; i += 32) {
    const int r = i / kChunks, c = i % kChunks;
    const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(kept.chunk(r, c));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t first = bytes.word[2 * half], second = bytes.word[2 * half + 1];
      *reinterpret_cast<Bytes16*>(wide.chunk(r, 2 * c + half)) = {
          {bits_of(Kept::low(first)), bits_of(Kept::high(first)), bits_of(Kept::low(second)),
           bits_of(Kept::high(second))}};
    }
  }
}

// Kept: how keys and values lie in memory.
template <class M, int kDim, class Kept = M>
ATTN_DEVICE void decode(const DecodeArgs& args) {
  using Element = typename M::Element;
  using KeptElement = typename Kept::Element;
  using T = SharedTile<M, kDim>;
  using KeptTile = SharedTile<Kept, kDim>;
  constexpr bool kNarrow = sizeof(KeptElement) < sizeof(Element);
  constexpr int kKeys = decode_keys(M::kMath), kMmaN = kKeys / 8, kRing = decode_ring(M::kMath, kDim, kNarrow);
  constexpr int kThreads = 32 * kDecodeWarps, kWarpBytes = decode_warp_bytes(M::kMath, kDim, kNarrow);
  static_assert(kRing >= 2 && kDecodeRows * kDim * 4 <= kWarpBytes, "a warp's output takes the place of its ring");
  static_assert(kCombineBytes <= kDecodeWarps * kWarpBytes, "parts are put together where the rings were");
  const T q{shared_memory()};
  char* rings = q.data + decode_query_bytes(M::kMath, kDim);
  char* ring = rings + warp_index() * kWarpBytes;
  const T wide{ring + kRing * decode_kept_bytes(kDim, kNarrow)};
  float* statistics = reinterpret_cast<float*>(rings + kDecodeWarps * kWarpBytes);  // [row][warp][maximum, sum]
  float* merged = statistics + kDecodeRows * kDecodeWarps * 2;  // [row][maximum, sum]
  const Flags flags = reinterpret_cast<Flags>(merged + kDecodeRows * 2) + warp_index() * kKeys;

  const AttentionParams& p = args.p;
  const int split = block_index() % args.splits;
  const int part_of = block_index() / args.splits;  // the tile, among those of all heads
  const Head head(p, args.factors, args.rows, part_of / args.rows.tiles);
  const RowBlock block(head, part_of % args.rows.tiles * kDecodeRows, kDecodeRows);
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const float scale = args.factors.scale;
  // In float32, values are looked through in any case: infinities do not survive 3xTF32.
  const bool plain = M::kMmaK == 16 && args.plain;

  // The block's share of the keys, in steps of one tile for each warp.
  constexpr int kStepKeys = kDecodeWarps * kKeys;
  const int begin = round_down(block.any.begin, kKeys);
  const int steps = max((block.any.end - begin + kStepKeys - 1) / kStepKeys, 0);
  const int steps_each = (steps + args.splits - 1) / args.splits;
  const int first_step = min(split * steps_each, steps), own_steps = min(steps_each, steps - first_step);
  const auto first_key = [&](int step) { return begin + (first_step + step) * kStepKeys + warp_index() * kKeys; };
  const auto values = [&](int step) {
    return KeyRows<const KeptElement>::of_tile(p.v, head, first_key(step), head.length_k, args.aligned.v);
  };
  const auto slot = [&](int item) { return KeptTile{ring + item % kRing * decode_kept_bytes(kDim, kNarrow)}; };
  // The same, when it has arrived, as products take it.
  const auto arrived = [&](int item) {
    if constexpr (kNarrow) {
      widen<M, Kept, kDim, kKeys>(wide, slot(item));
      sync_warp();
      return wide;
    } else {
      return slot(item);
    }
  };
  // Item 2 i is the keys of step i, item 2 i + 1 its values.
  const auto fetch = [&](int item) {
    if (item < 2 * own_steps) {
      if (item & 1) {
        load_tile<Kept, kDim, kKeys, 32, Warp>(slot(item), values(item >> 1), value_dim);
      } else {
        const int key = first_key(item >> 1);
        const auto keys = KeyRows<const KeptElement>::of_tile(p.k, head, key, head.length_k, args.aligned.k);
        load_tile<Kept, kDim, kKeys, 32, Warp>(slot(item), keys, head_dim);
      }
    }
    copy_async_commit();
  };

  if (own_steps > 0) {
    const QueryRows<const Element> queries(p.q, head, block.first, head.rows_in_length(), args.aligned.q);
    load_tile<M, kDim, kDecodeRows, kThreads>(q, queries, head_dim);
  }
#pragma unroll 1
  for (int item = 0; item < kRing - 1; ++item) fetch(item);  // the queries belong to the first
  copy_async_wait<kRing - 2>();
  sync_block();

  Acc<1, kDim / 8> o;
  clear<1, kDim / 8>(o);
  const auto rescale = [&o](const float (&factor)[1][2]) { scale_rows<1, kDim / 8>(o, factor); };
  RowStatistics<M, 1> rows;
#pragma unroll 1
  for (int step = 0; step < own_steps; ++step) {
    const int key = first_key(step);
    copy_async_wait<kRing - 2>();
    sync_warp();  // the keys are here for all lanes, and all are done with the values of the step before
    fetch(2 * step + kRing - 1);
    Acc<1, kMmaN> s;
    gemm_nt<M, kDim, 1, kMmaN>(s, q, 0, arrived(2 * step), recomputed(lane_index()));
    const bool sees_all = plain && block.sees_all(key, kKeys);
    if (sees_all) {
      softmax_of_all<M, 1, kMmaN>(s, rows, scale, rescale);
    } else {
      softmax_of_some<M, false, 1, kMmaN>(s, rows, head, block.first, key, rescale);
    }
    copy_async_wait<kRing - 2>();
    sync_warp();  // the same for the values, and the keys
    fetch(2 * step + kRing);
    const T v = arrived(2 * step + 1);
    const bool nonfinite = !sees_all && zero_nonfinite_rows<M, kKeys, 32, Warp>(v, flags);
    gemm_nn<M, kDim, 1, kMmaN>(o, s, v, value_dim, recomputed(lane_index()));
    if (nonfinite) add_nonfinite_rows<M, kDim, 1, kMmaN, Kept>(o, s, flags, values(step), value_dim);
  }
  copy_async_wait<0>();
  scale_rows<1, kDim / 8>(o, rows.finish().of);

  // Each warp's sums become a table of floats in its own ring.
  const int g = lane_index() >> 2, t = lane_index() & 3;
  sync_warp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + g;
    if (t == 0) {
      statistics[(row * kDecodeWarps + warp_index()) * 2] = rows.maximum[0][half];
      statistics[(row * kDecodeWarps + warp_index()) * 2 + 1] = rows.sum[0][half];
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      float* place = table_place<kDim>(ring, row, 8 * n + 2 * t);
      place[0] = o[0][n][2 * half];
      place[1] = o[0][n][2 * half + 1];
    }
  }
  sync_block();
  const int own_rows = block.end - block.first;
  merge_statistics(statistics, own_rows, kDecodeWarps, merged);
  sync_block();

  const QueryRows<Element> out(p.out, head, block.first, block.end, args.aligned.out);
  const auto finish = [&](int row, int column, const Quad& sum) {
    float maximum = merged[2 * row], total = merged[2 * row + 1];
    const int position = head.position(block.first + row), query_head = head.head(block.first + row, position);
    const float kept = args.factors.keep * join_sink(p, query_head, maximum, total);
    const float factor = total == 0.0f ? 0.0f : kept / total;
    struct alignas(4 * sizeof(Element)) {
      Element x[4];
    } result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.x[i] = M::from_float(sum.x[i] * factor);
    Element* target = out.row(row) + column * out.dim_stride;
    if (out.aligned == 16) {
      if (column < value_dim) *reinterpret_cast<decltype(result)*>(target) = result;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + i < value_dim) target[i * out.dim_stride] = result.x[i];
    }
    if (column > 0) return;
    write_statistics(p, head.statistic(query_head, position), maximum, total);
  };
  const int quads = static_cast<int>(decode_quads(value_dim));
  const int items = own_rows * quads;
  const int64_t first_part = int64_t{part_of} * args.splits;
#pragma unroll 1
  for (int item = thread_index(); item < items; item += kThreads) {
    const int row = item / quads, column = item % quads * 4;
    Quad sum;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      char* table = rings + warp * kWarpBytes;
      sum.add(statistics[(row * kDecodeWarps + warp) * 2],
              *reinterpret_cast<const Bytes16*>(table_place<kDim>(table, row, column)));
    }
    if (args.splits == 1) {
      finish(row, column, sum);
      continue;
    }
    const int64_t line = (first_part + split) * kDecodeRows + row;
    reinterpret_cast<Bytes16*>(args.partial_out)[line * quads + column / 4] = sum.bytes();
    if (column == 0) {
      args.partial_stats[2 * line] = merged[2 * row];
      args.partial_stats[2 * line + 1] = merged[2 * row + 1];
    }
  }
  if (args.splits == 1) return;

  sync_block();  // by which one thread knows what all have written, and may say so
  bool last = false;
  if (thread_index() == 0) {
    fence_acquire_release();
    last = arrives_last(args.tickets + part_of, args.launch, args.splits);
    fence_acquire_release();
  }
  if (!sync_block_or(last)) return;

  combine_parts(args, first_part, own_rows, quads, rings, merged, finish);
}

}  // namespace attn_ops::cuda
