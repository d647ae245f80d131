// Where the keys and the values of a head are read: in place, or from a copy.
#pragma once

#include "row_tile.h"

namespace attn_ops::cpu {
namespace {

// Whether the copies of all keys and values of a head are kept for a task; see kKeptKeysBytes.
template <class T>
bool keeps_keys(const AttentionParams& p) {
  return p.seqlen_k * (p.head_dim + p.value_dim) * static_cast<int64_t>(sizeof(T)) <= kKeptKeysBytes;
}

// The keys or the values of one head as rows of T, block by block: in place when the memory already is that, else
// copied, and multiplied by their scales. Copies pay when several tiles share them, even of the same type: BSHD rows lie
// num_heads * dim apart, often a multiple of 4 KiB, where the rows of a block would fight for a few cache sets.
template <class T>
class KeyRows {
 public:
  // Scratch for `dim` columns: rows, and for kept copies of which block they are.
  static int64_t bytes(const AttentionParams& p, int64_t dim) {
    return Arena::bytes<T>(copies(p) * kBlockKeys * dim) + Arena::bytes<int32_t>(copies(p));
  }

  // `scales` of int8 rows, else with data null. No rows that meet keys together see more than `together` of them, and none go
  // back: copies of so many stay, in the caches if they are few.
  KeyRows(const HeadRows& r, const StridedView& v, const StridedView& scales, int64_t dim, bool shared, int64_t together,
          Arena* arena)
      : rows_(r),
        view_(v),
        scales_(scales),
        dim_(dim),
        stride_(v.step()),
        in_place_(v.dtype == kDTypeOf<T> && v.stride[3] == 1 && !r.p.block_table &&
                  (!shared || v.stride[1] == dim)),
        kept_(shared && keeps_keys<T>(r.p)),
        slots_(copies(r.p)) {
    if (together / kBlockKeys + 2 < slots_) slots_ = together / kBlockKeys + 2;
    copy_ = arena->take<T>(copies(r.p) * kBlockKeys * dim);
    copied_ = arena->take<int32_t>(copies(r.p));
    memset(copied_, -1, copies(r.p) * sizeof(int32_t));
  }

  // Keys k0 .. k1, at most kBlockKeys. Shared blocks lie between multiples of kBlockKeys.
  void load(int64_t k0, int64_t k1) {
    begin_ = k0;
    end_ = k1;
    finite_ = Finite::kUnknown;
    if (in_place_) {
      data_ = reinterpret_cast<const T*>(rows_.key_row(view_, k0));
      ld_ = view_.stride[1];
    } else if (kept_) {
      const int64_t block = k0 / kBlockKeys, first = block * kBlockKeys, slot = block % slots_;
      T* const kept = copy_ + slot * kBlockKeys * dim_;
      if (copied_[slot] != block) {
        const int64_t end = first + kBlockKeys < rows_.length_k ? first + kBlockKeys : rows_.length_k;
        copy(first, end, kept);
        copied_[slot] = static_cast<int32_t>(block);
      }
      data_ = kept + (k0 - first) * dim_;
      ld_ = dim_;
    } else {
      copy(k0, k1, copy_);
      data_ = copy_;
      ld_ = dim_;
    }
  }

  const T* at(int64_t key) const { return data_ + (key - begin_) * ld_; }
  int64_t ld() const { return ld_; }

  bool finite() {
    if (finite_ == Finite::kUnknown)
      finite_ = all_finite(data_, ld_, end_ - begin_, dim_) ? Finite::kYes : Finite::kNo;
    return finite_ == Finite::kYes;
  }

 private:
  enum class Finite { kUnknown, kYes, kNo };

  // Blocks that there is room for.
  static int64_t copies(const AttentionParams& p) { return keeps_keys<T>(p) ? p.seqlen_k / kBlockKeys + 1 : 1; }

  void copy(int64_t k0, int64_t k1, T* to) const {
    const int64_t next_row = view_.stride[1] * size_of(view_.dtype);
    for (int64_t j = k0, end; j < k1; j = end) {
      end = neighbours_end(rows_.p, j, k1);
      const char* row = rows_.key_row(view_, j);
      for (int64_t i = j; i < end; ++i, row += next_row, to += dim_) {
        load_row<T>(view_.dtype, row, stride_, dim_, false, to);
        if (scales_.data) multiply(to, rows_.scale<T>(scales_, i));
      }
    }
  }

  void multiply(T* row, T scale) const {
    for (int64_t d = 0; d < dim_; ++d) row[d] *= scale;
  }

  const HeadRows& rows_;
  const StridedView &view_, &scales_;
  int64_t dim_, stride_, begin_ = 0, end_ = 0, ld_ = 0;
  bool in_place_, kept_;
  int64_t slots_;  // copies in use
  T* copy_;
  int32_t* copied_;
  const T* data_ = nullptr;
  Finite finite_ = Finite::kUnknown;
};

// The most keys that any `count` of the tiles first .. end see together.
template <class T>
int64_t most_keys_seen(const HeadRows& r, const Tiling<T>& tiling, int64_t first, int64_t end, int64_t count) {
  int64_t most = 0;
  for (int64_t t = first; t < end; t += count) {
    const int64_t last = tiling.first_row(t + count < end ? t + count : end);
    const KeyRange seen = r.keys_seen(tiling.first_row(t), last < r.count ? last : r.count);
    if (seen.end - seen.begin > most) most = seen.end - seen.begin;
  }
  return most;
}

// meet(tile, k0, k1) for each of `count` tiles and each block of the keys begin .. end of which it sees keys k0 .. k1,
// when both are loaded. Key 4 n starts a group of random numbers, so k0 is a multiple of 4.
template <class T, class Tile, class Meet>
ATTN_INLINE void for_each_block(Tile* tiles, int64_t count, int64_t begin, int64_t end, KeyRows<T>& keys,
                                KeyRows<T>& values, const Meet& meet) {
  for (int64_t block = begin / kBlockKeys * kBlockKeys; block < end; block += kBlockKeys) {
    const int64_t block_begin = block < begin ? begin / 4 * 4 : block;
    const int64_t block_end = block + kBlockKeys < end ? block + kBlockKeys : end;
    keys.load(block_begin, block_end);
    values.load(block_begin, block_end);
    for (Tile* t = tiles; t < tiles + count; ++t) {
      const int64_t k0 = t->begin > block_begin ? t->begin / 4 * 4 : block_begin;
      const int64_t k1 = t->end < block_end ? t->end : block_end;
      if (k0 < k1 && t->begin < t->end) meet(*t, k0, k1);
    }
  }
}

}  // namespace
}  // namespace attn_ops::cpu
