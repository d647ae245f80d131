// Which keys of a block query rows see, as bits.
//
// Boolean masks are read along the keys, as they lie or packed (packed_masks.h), 64 to a word, and ANDed there:
// row_bits. A tile wants a word for each key, with a bit for each lane, and only a block that is seen in part has its
// words transposed.
// A mask of bytes turned into vectors row by row and transposed as numbers took 1.5 times the unmasked time (AVX-512).
#pragma once

#include "mask_bits.h"
#include "row_tile.h"

namespace attn_ops::cpu {
namespace {

// How much of a block some rows see.
enum class Visibility { kNothing, kSome, kAll };

// Bit j of one query row: no boolean mask hides key k0 + j, for j < n <= 64. Of the masks only those that asks() names.
template <class Asks>
ATTN_INLINE uint64_t row_bits(const HeadRows& r, int64_t position, int64_t head, int64_t k0, int64_t n,
                              const Asks& asks) {
  uint64_t bits = bits_between(0, n);
  if (r.p.mask_bits.data && !by_key(r.p.mask_bits) && asks(r.p.mask_bits))
    bits &= packed_bits(r.score_row(r.p.mask_bits, position, head), k0);
  for (int m = 0; m < r.p.num_masks; ++m) {
    const StridedView& mask = r.p.masks[m];
    if (!asks(mask)) continue;
    const char* const row = r.score_row(mask, position, head) + k0 * mask.stride[3];
    __builtin_prefetch(row + kBlockKeys * mask.stride[3]);  // of the next block
    bits &= bits_of(row, mask.stride[3], n);
  }
  return bits;
}

// The same of what is not a mask of bits but structure: ids that differ, blocks that are empty.
ATTN_INLINE uint64_t structure_bits(const HeadRows& r, int64_t position, int64_t head, int64_t k0, int64_t n) {
  const AttentionParams& p = r.p;
  uint64_t bits = bits_between(0, n);
  if (p.query_ids.data) {
    const int32_t id = p.query_ids.of(r.batch)[position], *const key_ids = p.key_ids.of(r.batch) + k0;
    uint64_t same = 0;
    for (int64_t j = 0; j < n; ++j) same |= uint64_t{key_ids[j] == id} << j;
    bits &= same;
  }
  if (p.blocks.data) {
    const char* const row = r.score_row(p.blocks, position / p.block_q, head);
    for (int64_t j = 0, next; j < n; j = next) {
      const int64_t block = (k0 + j) / p.block_k;
      next = (block + 1) * p.block_k - k0;
      if (!row[block * p.blocks.stride[3]]) bits &= ~bits_between(j, next);
    }
  }
  return bits;
}

// Whether anything but intervals may hide keys, bias apart.
ATTN_INLINE bool hides_by_bits(const AttentionParams& p) {
  return p.num_masks > 0 || p.mask_bits.data || p.query_ids.data || p.blocks.data;
}

// Whether structure_bits are the same for two rows.
ATTN_INLINE bool same_structure(const HeadRows& r, int64_t position, int64_t head, int64_t position2, int64_t head2) {
  const AttentionParams& p = r.p;
  const int32_t* const ids = p.query_ids.data ? p.query_ids.of(r.batch) : nullptr;
  return (!ids || ids[position] == ids[position2]) &&
         (!p.blocks.data || r.score_row(p.blocks, position / p.block_q, head) ==
                                r.score_row(p.blocks, position2 / p.block_q, head2));
}

// A score-shaped view that is the same for all `rows`, such as key padding. (Rows: a RowTile or a RowGroup.)
template <class Rows>
bool same_for_all_rows(const HeadRows& r, const Rows& rows, const StridedView& v) {
  return rows.rows == 1 || (v.stride[2] == 0 && (r.group == 1 || v.stride[1] == 0));
}

// Whether the bias is -inf everywhere. Mostly the first element tells that it is not.
template <class T, class Rows>
bool bias_hides_all(const HeadRows& r, const Rows& rows, int64_t k0, int64_t keys) {
  const StridedView& bias = r.p.bias;
  const int64_t stride = bias.step();
  const int count = same_for_all_rows(r, rows, bias) ? 1 : rows.rows;
  for (int i = 0; i < count; ++i) {
    T values[kBlockKeys];
    load_row<T>(bias.dtype, r.score_row(bias, rows.position[i], rows.head[i]) + k0 * stride, stride, keys, false,
                values);
    for (int64_t j = 0; j < keys; ++j)
      if (values[j] != -kInfinity<T>) return false;
  }
  return true;
}

// Bit i of visible[j]: neither a boolean mask, those packed by key apart, nor structure hides key k0 + j from lane i. What is the same for all rows
// is read once, and structure where it changes: most of the time that is nowhere within a tile.
template <class T>
void lane_bits(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys, uint64_t* visible) {
  const auto shared = [&](const StridedView& mask) { return same_for_all_rows(r, tile, mask); };
  const auto own = [&](const StridedView& mask) { return !shared(mask); };
  const StridedView& packed = r.p.mask_bits;
  bool by_row = packed.data && !by_key(packed) && own(packed);
  uint64_t starts = 1;  // lanes whose structure is not that of the lane before
  for (int m = 0; m < r.p.num_masks; ++m) by_row = by_row || own(r.p.masks[m]);
  for (int i = 1; i < tile.rows; ++i)
    if (!same_structure(r, tile.position[i], tile.head[i], tile.position[i - 1], tile.head[i - 1]))
      starts |= uint64_t{1} << i;
  for (int64_t at = 0; at < keys; at += 64, visible += 64) {
    const int64_t n = keys - at < 64 ? keys - at : 64;
    uint64_t of_all = row_bits(r, tile.position[0], tile.head[0], k0 + at, n, shared);
    if (starts == 1) of_all &= structure_bits(r, tile.position[0], tile.head[0], k0 + at, n);
    uint64_t rows[64] = {}, structure = ~uint64_t{0};
    bool in_part = false;
    for (int i = 0; (by_row || starts != 1) && i < tile.rows; ++i) {
      if (starts != 1 && starts >> i & 1)
        structure = structure_bits(r, tile.position[i], tile.head[i], k0 + at, n);
      rows[i] = row_bits(r, tile.position[i], tile.head[i], k0 + at, n, own) & structure;
      in_part = in_part || rows[i] != bits_between(0, n);
    }
    if (in_part) transpose_bits(rows);
    for (int64_t j = 0; j < n; ++j) visible[j] = (in_part ? rows[j] : ~uint64_t{0}) & -(of_all >> j & 1);
  }
}

// visible[0 .. keys) by intervals, structure and boolean masks, to be used only where the answer is kSome; kNothing also where a
// bias of -inf hides all. Lanes not in use do not count.
template <class T>
__attribute__((noinline)) Visibility visible_keys(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys,
                                                  uint64_t* visible) {
  const AttentionParams& p = r.p;
  if (p.bias.data && bias_hides_all<T>(r, tile, k0, keys)) return Visibility::kNothing;
  const bool by_interval = !tile.all_see(k0, k0 + keys);
  if (!by_interval && !hides_by_bits(p)) return Visibility::kAll;

  lane_bits<T>(r, tile, k0, keys, visible);
  if (p.mask_bits.data && by_key(p.mask_bits))
    hide_by_key(p.mask_bits, r.score_row(p.mask_bits, 0, 0), tile.first, tile.rows, k0, keys, visible);
  if (by_interval) {  // the ends of the intervals never move back: the lanes that see a key are neighbours
    int begin = 0, end = 0;
    for (int64_t j = 0; j < keys; ++j) {
      while (begin < tile.rows && tile.hi[begin] <= k0 + j) ++begin;
      while (end < tile.rows && tile.lo[end] <= k0 + j) ++end;
      visible[j] &= bits_between(begin, end);
    }
  }
  const uint64_t used = bits_between(0, tile.rows);
  uint64_t any = 0, every = ~uint64_t{0};
  for (int64_t j = 0; j < keys; ++j) {
    any |= visible[j];
    every &= visible[j];
  }
  return !(any & used) ? Visibility::kNothing : (every & used) == used ? Visibility::kAll : Visibility::kSome;
}

}  // namespace
}  // namespace attn_ops::cpu
