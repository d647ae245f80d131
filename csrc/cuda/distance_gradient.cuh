// The gradient of relative_bias [num_heads, 2 reach + 1]: ds, summed over all pairs of a row and a key at each distance,
//
//   d_table[reach + d] = sum of ds[i][j] where clip(j - own_i, -reach, reach) = d
//
// A block owns as many distances of a head as it has threads, and takes every parts-th of the head's tiles of rows, in
// order. Its parts are added up in their order by a kernel that comes after: the same bits every time.
#pragma once

#include "score_gradient.cuh"

namespace attn_ops::cuda {

// A row's pairs at and beyond each end of the table, of one tile of keys: they are many, so each row has a thread to add
// them up.
struct TableEnds {
  float *low, *high;  // [rows of a tile]
};

template <class M, int kDim>
ATTN_DEVICE void distance_gradient(const BackwardArgs& args) {
  using Ds = ScoreGradientTile<M, kDim>;
  constexpr int kBlockM = Ds::kBlockM, kBlockN = Ds::kBlockN, kThreads = Ds::kThreads;
  static_assert(kBlockM <= kThreads, "each row has a thread");
  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const int reach = static_cast<int>(p.relative_reach);

  int index = block_index();
  const int part = index % args.parts;
  index /= args.parts;
  const int tiles = distance_tiles(p.relative_reach, kThreads);
  const int first = index % tiles * kThreads - reach, query_head = index / tiles;  // the first distance
  const int last = min(first + kThreads - 1, reach), own = first + thread_index();
  const bool is_low = first == -reach, is_high = last == reach;

  const Rows rows = Ds::rows_of_head(p);
  const int row_tiles = (rows.count + kBlockM - 1) / kBlockM;
  const float* table = Ds::table();
  const TableEnds ends{Ds::table() + Ds::kTableFloats, Ds::table() + Ds::kTableFloats + kBlockM};
  float sum = 0.0f;
  // Row r of the tile is at r's own distances from the keys: its key at distance 0 is number origin + r of the tile.
  const auto gather = [&](int64_t origin) {
    const auto column = [&](int r, int distance) {
      const int64_t c = origin + r + distance;
      return static_cast<int>(c < -1 ? -1 : c > kBlockN ? kBlockN : c);
    };
    if (const int r = thread_index(); (is_low || is_high) && r < kBlockM) {
      const float* row = table + r * Ds::kPitch;
      const int low_end = reach == 0 ? kBlockN : column(r, -reach), high_begin = column(r, reach);
      float low = 0.0f, high = 0.0f;
      for (int c = 0; c < kBlockN; ++c) {
        low += c <= low_end ? row[c] : 0.0f;
        high += c >= high_begin ? row[c] : 0.0f;
      }
      ends.low[r] = low;
      ends.high[r] = high;
    }
    sync_block();
#pragma unroll 1
    for (int r = 0; r < kBlockM && own <= reach; ++r) {
      const int c = column(r, own);
      if (own == -reach) sum += ends.low[r];
      else if (own == reach) sum += ends.high[r];
      else if (c >= 0 && c < kBlockN) sum += table[r * Ds::kPitch + c];
    }
    sync_block();
  };
  // A tile of rows in which every row is at the same distances of its own.
  const auto add_rows = [&](const Head& head, int row) {
    const RowBlock block(head, row, kBlockM);
    const int64_t origin = head.own_at(row);
    // Keys at the distances of this block, of any row of the tile.
    const int64_t low = is_low ? block.any.begin : origin + first;
    const int64_t high = is_high ? block.any.end : origin + kBlockM + last;
    const int begin = low > block.any.begin ? static_cast<int>(low < block.any.end ? low : block.any.end) : block.any.begin;
    const int end = high < block.any.end ? static_cast<int>(high > begin ? high : begin) : block.any.end;
#pragma unroll 1
    for (int key = round_down(begin, kBlockN); key < end; key += kBlockN) {
      if (block.sees_none(head, key, kBlockN)) continue;
      Acc<Ds::kMmaM, Ds::kMmaN> s;
      Ds::make(s, args, head, row, key);
      Ds::write_table(s);
      gather(origin - key);
    }
  };
#pragma unroll 1
  for (int64_t i = part; i < p.batch * row_tiles; i += args.parts) {
    const int batch = static_cast<int>(i / row_tiles), row_tile = static_cast<int>(i % row_tiles);
    add_rows(Head(p, args.factors, rows, batch, Ds::kv_head_of(p, query_head), query_head), row_tile * kBlockM);
  }
  if (own > reach) return;
  float* target = args.parts == 1 ? static_cast<float*>(b.d_relative_bias)
                                  : args.partial_tables + part * p.num_heads * (2 * p.relative_reach + 1);
  target[query_head * (2 * p.relative_reach + 1) + reach + own] = sum;
}

// The parts of the table, added up; a thread for each of its numbers.
ATTN_DEVICE void sum_tables(const BackwardArgs& args) {
  const AttentionParams& p = args.b.forward;
  const int64_t size = p.num_heads * (2 * p.relative_reach + 1);
  const int64_t i = int64_t{block_index()} * kTableThreads + thread_index();
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 1
  for (int part = 0; part < args.parts; ++part) sum += args.partial_tables[part * size + i];
  static_cast<float*>(args.b.d_relative_bias)[i] = sum;
}

}  // namespace attn_ops::cuda
