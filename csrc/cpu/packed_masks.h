// Boolean masks that differ by row and are the same for all heads, read once for all of them: packed to bits, ANDed, in
// the workspace, where they take an eighth of what they are. All other masks are read where they lie.
//
// Words are of 64 keys of a row, or, so that no head has to transpose them for its tiles, of 64 rows of a key: rows of the list
// that a head's tiles are cut from, in which each position, and with it its bits, stands `group` times.
#pragma once

#include "../mask.h"
#include "mask_bits.h"
#include "schedule.h"

namespace attn_ops::cpu {
namespace {

class PackedMasks {
 public:
  // group: 0 where there are no tiles.
  PackedMasks(const AttentionParams& p, int64_t group)
      : p_(p), by_key_(0 < group && group <= kMaskGroup), group_(by_key_ ? group : 1), rows_(by_key_ ? 64 : 1),
        batches_(1) {
    for (int m = 0; m < p.num_masks; ++m) {
      if (!packs(p.masks[m])) continue;
      any_ = true;
      if (p.masks[m].stride[0] != 0) batches_ = p.batch;
    }
  }

  int64_t bytes() const { return any_ ? aligned(times(times(batches_, blocks()), block_bytes())) : 0; }

  // How many blocks of rows, as many as a word has, pack() takes in all; and how many at a time.
  int64_t count() const { return any_ ? batches_ * blocks() : 0; }
  int64_t at_once() const { return std::max<int64_t>(1, kMaskBytes / std::max<int64_t>(1, rows_ * p_.seqlen_k)); }

  // Blocks first .. last, of the keys that intervals leave to see; the others are hidden whatever the mask says.
  void pack(int64_t first, int64_t last, char* memory) const {
    for (int64_t at = first; at < last; ++at) {
      const int64_t batch = at / blocks(), row = at % blocks() * rows_;
      const int64_t count = std::min(rows_, list_rows() - row);
      char* const to = memory + at * block_bytes();
      memset(to, 0, block_bytes());
      KeyRange seen{0, p_.seqlen_k};
      if (batches_ == p_.batch) {
        seen = seen_by(batch, row / group_);
        seen.end = std::max(seen.end, seen_by(batch, (row + count - 1) / group_).end);
      }
      for (int64_t k0 = seen.begin / 64 * 64; k0 < seen.end; k0 += 64) {
        const int64_t n = std::min<int64_t>(seen.end - k0, 64);
        uint64_t words[64] = {};
        for (int64_t i = 0; i < count; ++i)
          words[i] = i > 0 && (row + i) % group_ ? words[i - 1] : bits_of(batch, (row + i) / group_, k0, n);
        if (by_key_) transpose_bits(words);
        memcpy(to + k0 / 64 * rows_ * 8, words, (by_key_ ? n : 1) * 8);
      }
    }
  }

  // The call with them instead of the masks they are of.
  AttentionParams in(const AttentionParams& given, char* memory) const {
    AttentionParams p = given;
    if (!any_) return p;
    p.num_masks = 0;
    for (int m = 0; m < given.num_masks; ++m)
      if (!packs(given.masks[m])) p.masks[p.num_masks++] = given.masks[m];
    p.mask_bits.data = memory;
    p.mask_bits.dtype = DType::kBool;  // strides are bytes, of axis 2 from one block of rows to the next
    p.mask_bits.stride[0] = batches_ > 1 ? blocks() * block_bytes() : 0;
    p.mask_bits.stride[2] = block_bytes();
    p.mask_bits.stride[3] = by_key_ ? 8 : 0;
    return p;
  }

 private:
  bool packs(const StridedView& mask) const {
    return p_.num_heads > 1 && mask.stride[1] == 0 && mask.stride[2] != 0 && mask.stride[3] != 0;
  }
  int64_t list_rows() const { return times(p_.seqlen_q, group_); }
  int64_t blocks() const { return ceil_div(list_rows(), rows_); }
  int64_t block_bytes() const { return by_key_ ? times(p_.seqlen_k, 8) : packed_row_bytes(p_.seqlen_k); }

  KeyRange seen_by(int64_t batch, int64_t position) const {
    const int64_t length_q = p_.query_lengths ? p_.query_lengths[batch] : p_.seqlen_q;
    const int64_t length_k = p_.key_lengths ? p_.key_lengths[batch] : p_.seqlen_k;
    const int64_t own = position + row_shift(p_.mask, batch, length_q, length_k);
    return key_range(p_.mask, batch, position, own, length_q, length_k);
  }

  uint64_t bits_of(int64_t batch, int64_t position, int64_t k0, int64_t n) const {
    uint64_t bits = bits_between(0, n);
    for (int m = 0; m < p_.num_masks; ++m) {
      const StridedView& mask = p_.masks[m];
      if (!packs(mask)) continue;
      bits &= cpu::bits_of(static_cast<const char*>(mask.data) + batch * mask.stride[0] + position * mask.stride[2] +
                               k0 * mask.stride[3],
                           mask.stride[3], n);
    }
    return bits;
  }

  const AttentionParams& p_;
  const bool by_key_;
  const int64_t group_, rows_;  // rows of a position in the list, and of a block
  int64_t batches_;
  bool any_ = false;
};

}  // namespace
}  // namespace attn_ops::cpu
