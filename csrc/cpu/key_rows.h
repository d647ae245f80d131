// Where the keys and the values of a head are read: in place, or from a copy.
#pragma once

#include "row_tile.h"

namespace attn_ops::cpu {
namespace {

// Whether the copies of all keys and values of a head are kept for a task; see kKeptKeysBytes.
template <class E>
bool keeps_keys(const AttentionParams& p) {
  const int64_t size = static_cast<int64_t>(sizeof(E)) / Product<E>::numbers;
  return p.seqlen_k * (p.head_dim + p.value_dim) * size <= kKeptKeysBytes;
}

// How tiles pass the keys of a task.
struct Passes {
  int64_t tiles;     // that will read them
  int64_t at_once;   // tiles that read them together, at most
  int64_t together;  // keys that those see, at most

  bool shared() const { return tiles > 1; }
  // How often a key is read when it has left L1, on the average.
  double each(int64_t keys) const {
    return keys == 0 ? 0 : static_cast<double>(tiles * together) / static_cast<double>(at_once * keys);
  }
};

// The keys or the values of one head as rows of E, block by block: in place when the memory already is that, else
// copied, and multiplied by their scales. Copies pay when several tiles share them, even of the same type, where BSHD rows,
// num_heads * dim apart, would fight for a few cache sets; elsewhere they are 3 to 7 % slower than in place (L2 of a MiB).
//
// Pairs are of two columns of a row, or with `of_rows` of one column of rows 2 n and 2 n + 1: then at() is for even keys. A matrix
// unit reads whole tiles, with zeros behind the last column, and such pairs by columns: ld() from one column to the next.
template <class E, bool of_rows = false>
class KeyRows {
 public:
  // Scratch for `dim` columns: rows, and for kept copies of which block they are.
  static int64_t bytes(const AttentionParams& p, int64_t dim) {
    return Arena::bytes<E>(copy_size(p, dim)) + Arena::bytes<int32_t>(copies(p)) + Arena::bytes<Finite>(blocks(p));
  }

  // `scales` of int8 rows, else with data null. No rows go back: copies of what is passed together stay, in the caches if that is
  // not much.
  KeyRows(const HeadRows& r, const StridedView& v, const StridedView& scales, int64_t dim, const Passes& passes, Arena* arena)
      : rows_(r),
        view_(v),
        scales_(scales),
        dim_(dim),
        columns_(of_rows ? dim : padded_elements<E>(dim)),
        in_place_(lies_so(v) && v.stride[3] == 1 && !r.p.block_table && !(passes.shared() && fight(passes))),
        kept_(passes.shared() && keeps_keys<E>(r.p)),
        slots_(copies(r.p)) {
    if (passes.together / kBlockKeys + 2 < slots_) slots_ = passes.together / kBlockKeys + 2;
    copy_ = arena->take<E>(copy_size(r.p, dim));
    copied_ = arena->take<int32_t>(copies(r.p));
    memset(copied_, -1, copies(r.p) * sizeof(int32_t));
    finite_ = arena->take<Finite>(blocks(r.p));
    memset(finite_, 0, blocks(r.p) * sizeof(Finite));
  }

  // Keys k0 .. k1, at most kBlockKeys. Shared blocks lie between multiples of kBlockKeys.
  void load(int64_t k0, int64_t k1) {
    begin_ = k0;
    end_ = by_columns ? k0 + whole_keys(k1 - k0) : k1;
    ld_ = by_columns ? kColumn : columns_;
    if (in_place_) {
      data_ = reinterpret_cast<const E*>(rows_.key_row(view_, k0));
      ld_ = view_.stride[1] / Product<E>::numbers;
    } else if (kept_) {
      const int64_t block = k0 / kBlockKeys, first = block * kBlockKeys, slot = block % slots_;
      E* const kept = copy_ + slot * block_size(dim_);
      if (copied_[slot] != block) {
        const int64_t end = first + kBlockKeys < rows_.length_k ? first + kBlockKeys : rows_.length_k;
        copy(first, end, kept);
        copied_[slot] = static_cast<int32_t>(block);
      }
      data_ = kept + place_of(k0 - first);
    } else {
      copy(k0, k1, copy_);
      data_ = copy_;
    }
  }

  const E* at(int64_t key) const { return data_ + place_of(key - begin_); }
  int64_t ld() const { return ld_; }

  // Whether what is loaded has neither Inf nor NaN. Groups of tiles that load the same block need not all look.
  bool finite() {
    Finite& known = finite_[begin_ / kBlockKeys];
    const int64_t begin = begin_ % kBlockKeys, end = begin + end_ - begin_;
    if (begin < known.begin || known.end < end) {
      const int64_t rows = of_rows ? elements<E>(end - begin) : end - begin;
      known = {static_cast<uint8_t>(begin), static_cast<uint8_t>(end),
               by_columns ? all_finite(data_, ld_, columns_, rows) : all_finite(data_, ld_, rows, columns_)};
    }
    return known.all;
  }

 private:
  // What was found of the keys begin .. end of a block: a part of them may be finite where not all are.
  struct Finite {
    uint8_t begin, end;
    bool all;
  };

  static constexpr bool by_columns = of_rows && kOfTiles<E>;
  // From one column to the next. Of a power of two the rows of a tile would share few sets of L1.
  static constexpr int64_t kColumn = kBlockKeys / 2 + MatrixUnit<E>::depth;

  int64_t place_of(int64_t key) const { return of_rows ? key / 2 * (by_columns ? 1 : ld_) : key * ld_; }
  static int64_t block_size(int64_t dim) {
    if (by_columns) return kColumn * round_to_width<Accumulator<E>>(dim);
    return of_rows ? kBlockKeys / 2 * dim : kBlockKeys * padded_elements<E>(dim);
  }
  // Of all, and what a matrix unit reads behind the last key.
  static int64_t copy_size(const AttentionParams& p, int64_t dim) {
    return copies(p) * block_size(dim) + (MatrixUnit<E>::depth - 1) * padded_elements<E>(dim);
  }
  static int64_t blocks(const AttentionParams& p) { return p.seqlen_k / kBlockKeys + 1; }
  // Blocks that there is room for.
  static int64_t copies(const AttentionParams& p) { return keeps_keys<E>(p) ? p.seqlen_k / kBlockKeys + 1 : 1; }
  // Whether a row in memory, if its elements are neighbours, is one of E.
  static bool lies_so(const StridedView& v) {
    return kOfPairs<E> ? !of_rows && !kOfTiles<E> && v.dtype == DType::kBFloat16 && v.stride[1] % 2 == 0
                       : v.dtype == kDTypeOf<Accumulator<E>>;
  }

  void copy(int64_t k0, int64_t k1, E* to) const {
    if constexpr (by_columns) return copy_columns(k0, k1, to);
    const int64_t next_row = view_.stride[1] * size_of(view_.dtype);
    for (int64_t j = k0, end; j < k1; j = end) {
      end = neighbours_end(rows_.p, j, k1);
      const char* row = rows_.key_row(view_, j);
      if constexpr (of_rows) {
        for (int64_t i = j; i < end; i += 2, row += 2 * next_row, to += columns_)
          load_row_pairs(view_.dtype, row, i + 1 < end ? row + next_row : nullptr, view_.step(), dim_, false, to);
      } else {
        copy_rows(row, next_row, end - j, to);
        if (scales_.data) multiply(j, end, to);
        to += (end - j) * columns_;
      }
    }
  }

  void copy_rows(const char* row, int64_t next_row, int64_t count, E* to) const {
    if constexpr (kOfPairs<E>) {  // as if they were floats
      if (view_.dtype != DType::kBFloat16) return round_rows(row, next_row, count, to);
      load_rows_apart<float>(DType::kFloat32, row, next_row, count, sizeof(E), elements<E>(dim_), reinterpret_cast<float*>(to),
                             columns_);
    } else {
      load_rows_apart<E>(view_.dtype, row, next_row, count, view_.step(), dim_, to, columns_);
    }
  }

  // The same of rows that are not bfloat16.
  void round_rows(const char* row, int64_t next_row, int64_t count, E* to) const {
    for (int64_t i = 0; i < count; ++i, row += next_row, to += columns_) {
      memset(to + elements<E>(dim_), 0, sizeof(E) * (columns_ - elements<E>(dim_)));
      in_rounded_parts<1>(view_.dtype, &row, 1, view_.step(), dim_, [=](const char* const* part, int64_t c, int64_t n) {
        memcpy(to + elements<E>(c), part[0], 2 * n);
      });
    }
  }

  // Whole tiles of keys, those behind the last one zeros.
  void copy_columns(int64_t k0, int64_t k1, E* to) const {
    if constexpr (by_columns) {
      constexpr int64_t kKeys = kTileNumbers<E>;
      for (int64_t j = k0; j < k1; j += kKeys, to += kKeys / 2) {
        const char* row[kKeys];
        const int64_t count = k1 - j < kKeys ? k1 - j : kKeys;
        for (int64_t i = 0; i < count; ++i) row[i] = rows_.key_row(view_, j + i);
        load_row_pairs_transposed(view_.dtype, row, static_cast<int>(count), view_.step(), dim_, to, kColumn);
      }
    }
  }

  // Rows of int8 by their scales.
  void multiply(int64_t key, int64_t end, E* rows) const {
    if constexpr (!kOfPairs<E>) {
      for (; key < end; ++key, rows += dim_) {
        const E scale = rows_.scale<E>(scales_, key);
        for (int64_t d = 0; d < dim_; ++d) rows[d] *= scale;
      }
    }
  }

  // Whether rows lie so far apart that they share few sets of the caches, and copies pay.
  bool fight(const Passes& passes) const {
    if (view_.stride[1] == dim_) return false;
    return view_.stride[1] * size_of(view_.dtype) % colliding_bytes() == 0 || copies_pay(passes.each(rows_.length_k));
  }

  // Keys of whole tiles.
  static int64_t whole_keys(int64_t n) { return whole_tiles<E>(elements<E>(n)) * Product<E>::numbers; }

  const HeadRows& rows_;
  const StridedView &view_, &scales_;
  int64_t dim_, columns_, begin_ = 0, end_ = 0, ld_ = 0;  // columns_: elements of a row
  bool in_place_, kept_;
  int64_t slots_;  // copies in use
  E* copy_;
  int32_t* copied_;
  const E* data_ = nullptr;
  Finite* finite_;  // of each block
};

// For sums over keys, not over columns.
template <class E>
using KeyPairs = KeyRows<E, kOfPairs<E>>;

// Where the keys that rows see end, for who takes keys in pairs: an odd key at the end is hidden by the rows' intervals.
template <class E>
int64_t end_of_keys(int64_t end, int64_t length_k) {
  return kOfPairs<E> && end % 2 != 0 && end < length_k ? end + 1 : end;
}

// The most keys that any `count` of the tiles first .. end see together.
template <class T>
int64_t most_keys_seen(const HeadRows& r, const Tiling<T>& tiling, int64_t first, int64_t end, int64_t count) {
  int64_t most = 0;
  for (int64_t t = first; t < end; t += count) {
    const KeyRange seen = keys_seen(r, tiling, t, t + count < end ? t + count : end);
    if (seen.end - seen.begin > most) most = seen.end - seen.begin;
  }
  return most;
}

// Keys of a call's first block.
inline int64_t keys_of_block(const AttentionParams& p) { return p.seqlen_k < kBlockKeys ? p.seqlen_k : kBlockKeys; }

// Meetings of the tiles first .. end with blocks of keys.
template <class T>
int64_t meetings(const HeadRows& r, const Tiling<T>& tiling, int64_t first, int64_t end) {
  int64_t all = 0;
  for (int64_t t = first; t < end; ++t) {
    const KeyRange seen = keys_seen(r, tiling, t, t + 1);
    if (seen.begin < seen.end) all += (seen.end - 1) / kBlockKeys - seen.begin / kBlockKeys + 1;
  }
  return all;
}

// What tiles begin with is a multiple of so many keys: key 4 n starts a group of random numbers, or a tile of a matrix unit.
template <class E>
constexpr int64_t kKeyGroup = kOfTiles<E> ? kTileNumbers<E> : 4;
template <class E>
int64_t start_of_group(int64_t key) {
  return key / kKeyGroup<E> * kKeyGroup<E>;
}

// Whether sums over n keys take zero weights of keys behind them.
template <class E>
bool sums_beyond(int64_t n) {
  return kOfTiles<E> && n % kTileNumbers<E> != 0;
}

// meet(tile, k0, k1) for each of `count` tiles and each block of the keys begin .. end of which it sees keys k0 .. k1,
// when both are loaded. k0 starts a group.
template <class E, class Tile, class Values, class Meet>
ATTN_INLINE void for_each_block(Tile* tiles, int64_t count, int64_t begin, int64_t end, int64_t length_k,
                                KeyRows<E>& keys, Values& values, const Meet& meet) {
  end = end_of_keys<E>(end, length_k);
  for (int64_t block = begin / kBlockKeys * kBlockKeys; block < end; block += kBlockKeys) {
    const int64_t block_begin = block < begin ? start_of_group<E>(begin) : block;
    const int64_t block_end = block + kBlockKeys < end ? block + kBlockKeys : end;
    keys.load(block_begin, block_end);
    values.load(block_begin, block_end);
    for (Tile* t = tiles; t < tiles + count; ++t) {
      const int64_t tile_end = end_of_keys<E>(t->end, length_k);
      const int64_t k0 = t->begin > block_begin ? start_of_group<E>(t->begin) : block_begin;
      const int64_t k1 = tile_end < block_end ? tile_end : block_end;
      if (k0 < k1 && t->begin < t->end) meet(*t, k0, k1);
    }
  }
}

}  // namespace
}  // namespace attn_ops::cpu
