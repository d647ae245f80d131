// Which query rows and keys a block works on, where they are in memory, and which of them see each other.
#pragma once

#include "../mask.h"
#include "args.h"
#include "workarounds.cuh"

namespace attn_ops::cuda {

ATTN_DEVICE int divide(int x, const Divisor& d) {
  return d.divisor == 1 ? x : static_cast<int>(multiply_high(static_cast<uint32_t>(x), d.multiplier) >> d.shift);
}

ATTN_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
ATTN_DEVICE int min(int x, int y) { return x < y ? x : y; }
ATTN_DEVICE int max(int x, int y) { return x > y ? x : y; }
ATTN_DEVICE int round_down(int x, int step) { return x - x % step; }

// The keys begin <= j < end that a row sees.
struct Interval {
  int begin, end;
};

// One key/value head of one batch entry: its query rows and its keys.
struct Head {
  const AttentionParams& p;
  const Factors& factors;
  const Rows& rows;
  int batch, kv_head, first_head;  // first_head: the query head of row 0
  int length_q, length_k;

  ATTN_DEVICE Head(const AttentionParams& p, const Factors& factors, const Rows& rows, int batch, int kv_head,
                   int first_head)
      : p(p),
        factors(factors),
        rows(rows),
        batch(batch),
        kv_head(kv_head),
        first_head(first_head),
        length_q(static_cast<int>(p.seqlen_q)),
        length_k(static_cast<int>(p.seqlen_k)) {
    if (p.query_lengths != nullptr) length_q = clamp(p.query_lengths[batch], 0, length_q);
    if (p.key_lengths != nullptr) length_k = clamp(p.key_lengths[batch], 0, length_k);
  }
  // The index-th of all batch entries' key/value heads, with all its query heads.
  ATTN_DEVICE Head(const AttentionParams& p, const Factors& factors, const Rows& rows, int index)
      : Head(p, factors, rows, index / static_cast<int>(p.num_kv_heads), index % static_cast<int>(p.num_kv_heads),
             index % static_cast<int>(p.num_kv_heads) * static_cast<int>(rows.group.divisor)) {}

  ATTN_DEVICE int position(int row) const { return divide(row, rows.group); }
  ATTN_DEVICE int group_size() const { return static_cast<int>(rows.group.divisor); }
  // Of all query heads, the one of `row` at `position`.
  ATTN_DEVICE int head(int row, int position) const { return first_head + row - position * group_size(); }
  // How many rows there are that may see something.
  ATTN_DEVICE int rows_in_length() const { return min(rows.count, length_q * group_size()); }
  // Which row of an array [batch, num_heads, seqlen_q, ...] is this one's.
  ATTN_DEVICE int64_t statistic(int head, int position) const {
    return (batch * p.num_heads + head) * p.seqlen_q + position;
  }

  // Where the row at `position` stands among the keys. Looked up each time, as addresses are: there are no registers to
  // keep more.
  ATTN_DEVICE int64_t own_at(int position) const {
    return position + row_shift(p.mask, recomputed(batch), length_q, length_k);
  }
  ATTN_DEVICE Interval seen_at(int position) const {
    const KeyRange r = window_range(p.mask, position, own_at(position), length_q, length_k);
    Interval seen{static_cast<int>(r.begin), static_cast<int>(r.end)};  // in 32 bits as soon as they can be
    if (position < length_q && p.mask.key_begin != nullptr) {
      narrow(p.mask, recomputed(batch), position, length_k, &seen.begin, &seen.end);
    }
    return seen;
  }
  // Whether the blocks of the mask, where it has any, show some of the keys first_key <= j < end_key to some of the rows
  // first_row <= r < end_row. Neither is empty.
  ATTN_DEVICE bool blocks_show(int first_row, int end_row, int first_key, int end_key) const {
    const StridedView& blocks = p.blocks;
    if (blocks.data == nullptr) return true;
    const int first_q = divide(position(first_row), factors.block_q);
    const int last_q = divide(position(end_row - 1), factors.block_q);
    const int first_k = divide(first_key, factors.block_k), last_k = divide(end_key - 1, factors.block_k);
    const int heads = blocks.stride[1] == 0 ? 1 : group_size();
    const uint8_t* of_entry = static_cast<const uint8_t*>(blocks.data) + recomputed(batch) * blocks.stride[0];
#pragma unroll 1
    for (int head = first_head; head < first_head + heads; ++head)
#pragma unroll 1
      for (int i = first_q; i <= last_q; ++i)
#pragma unroll 1
        for (int j = first_k; j <= last_k; ++j)
          if (of_entry[head * blocks.stride[1] + i * blocks.stride[2] + j * blocks.stride[3]] != 0) return true;
    return false;
  }
  // Rows past the last see nothing.
  ATTN_DEVICE Interval seen(int row) const { return row < rows.count ? seen_at(position(row)) : Interval{0, 0}; }
};

// The head of a block, which has so many of them, found once more behind the block's loop: kept through it, it spilled
// (sm_120, 13.0).
ATTN_DEVICE Head again(const Head& head, int block, int blocks) {
  return Head(head.p, head.factors, head.rows, recomputed(block) / blocks);
}

// The same head in a loop, where what follows from its lengths, 64 bits wide, spilled when it was kept (sm_100, 13.0).
ATTN_DEVICE Head anew(Head head) {
  head.length_q = recomputed(head.length_q);
  return head;
}

// Rows first <= r < end of a head, seen together. The ends of their intervals never move back.
struct RowBlock {
  int first, end;
  Interval any;  // no row sees a key outside
  Interval all;  // every row sees all keys inside

  ATTN_DEVICE RowBlock(const Head& h, int first, int count) : first(first), end(min(first + count, h.rows.count)) {
    // Rows past length_q see nothing.
    const int last = min(end, h.rows_in_length()) - 1;
    any = all = {0, 0};
    if (last < first) return;
    const Interval top = h.seen(first), bottom = h.seen(last);
    any = {top.begin, bottom.end};
    if (last == end - 1) all = {bottom.begin, top.end};
  }

  ATTN_DEVICE bool sees_none(const Head& h, int key, int keys) const {
    return key >= any.end || key + keys <= any.begin || !h.blocks_show(first, end, key, min(key + keys, any.end));
  }
  // From `key` on, `keys` at a time, the first tile of keys of which blocks show anything; past the end where none is.
  ATTN_DEVICE int next_shown(const Head& h, int key, int keys) const {
    while (key < any.end && !h.blocks_show(first, end, key, min(key + keys, any.end))) key += keys;
    return key;
  }
  ATTN_DEVICE bool sees_all(int key, int keys) const { return all.begin <= key && key + keys <= all.end; }
};

// --- Sources and targets of tiles (tile.cuh) -------------------------------------------------------------------------

// Keys or values of a head, from `first`; those at and past `limit` are never read. Where they lie in pages, they are
// those of one: decode's tiles, which begin at a multiple of their 16 keys or fewer, do not cross the end of any.
//
// kKept: where batch entry and head begin is kept, not found anew for each tile, where there are registers for it.
template <class Element, bool kKept = false>
struct KeyRows {
  Element* base;
  int64_t stride, dim_stride;
  int first, limit;
  int aligned;  // see Aligned

  ATTN_DEVICE KeyRows(const StridedView& view, const Head& h, int first, int limit, int aligned)
      : base(static_cast<Element*>(view.data) + (kKept ? h.batch : recomputed(h.batch)) * view.stride[0] +
             (kKept ? h.kv_head : recomputed(h.kv_head)) * view.stride[2]),
        stride(view.stride[1]),
        dim_stride(view.stride[3]),
        first(first),
        limit(limit),
        aligned(aligned) {}

  // Of a head whose keys may lie in pages.
  ATTN_DEVICE static KeyRows of_tile(const StridedView& view, const Head& h, int first, int limit, int aligned) {
    KeyRows rows(view, h, first, limit, aligned);
    const AttentionParams& p = h.p;
    if (p.block_table != nullptr && first < limit) {
      const int size = static_cast<int>(p.page_size), n = first / size;
      const int page = p.block_table[recomputed(h.batch) * p.block_table_stride + n];
      rows.base += (page - recomputed(h.batch)) * view.stride[0] - int64_t{n} * size * view.stride[1];
    }
    return rows;
  }

  ATTN_DEVICE bool exists(int r) const { return first + r < limit; }
  ATTN_DEVICE Element* row(int r) const { return base + (first + r) * stride; }
};

// The packed rows of all query heads of a key/value head, from `first`; those at and past `limit` are never read.
template <class Element>
struct QueryRows {
  Element* base;
  int64_t stride, head_stride, dim_stride;
  Divisor group;
  int first, limit;
  int aligned;  // see Aligned

  ATTN_DEVICE QueryRows(const StridedView& view, const Head& h, int first, int limit, int aligned)
      : base(static_cast<Element*>(view.data) + recomputed(h.batch) * view.stride[0] +
             recomputed(h.first_head) * view.stride[2]),
        stride(view.stride[1]),
        head_stride(view.stride[2]),
        dim_stride(view.stride[3]),
        group(h.rows.group),
        first(first),
        limit(limit),
        aligned(aligned) {}

  ATTN_DEVICE bool exists(int r) const { return first + r < limit; }
  ATTN_DEVICE Element* row(int r) const {
    const int position = divide(first + r, group);
    const int head = first + r - position * static_cast<int>(group.divisor);
    return base + position * stride + head * head_stride;
  }
};

}  // namespace attn_ops::cuda
