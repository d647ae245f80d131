// A tile of query rows: which rows, which keys they see, and the blocks of keys they meet.
//
// All query heads that share a key/value head are one list of rows, position-major: row r is position r / group of
// head kv_head * group + r % group. So grouped queries share every key they load, a decode step with 4 heads per
// kv head fills 4 lanes, and the ends of the key ranges still never move back along the list.
#pragma once

#include "../mask.h"
#include "blocking.h"
#include "gemm.h"
#include "pack.h"
#include "philox.h"

namespace attn_ops {
namespace cpu {
namespace {

// The rows of one (batch, kv head), or of one of its query heads alone.
struct HeadRows {
  const AttentionParams& p;
  int64_t batch, kv_head, first_head, group, count, length_q, length_k;

  HeadRows(const AttentionParams& params, int64_t b, int64_t kv) : HeadRows(params, b, kv, kv * group_size(params),
                                                                            group_size(params)) {}
  HeadRows(const AttentionParams& params, int64_t b, int64_t kv, int64_t first, int64_t heads)
      : p(params), batch(b), kv_head(kv), first_head(first), group(heads), count(params.seqlen_q * heads),
        length_q(params.query_lengths ? params.query_lengths[b] : params.seqlen_q),
        length_k(params.key_lengths ? params.key_lengths[b] : params.seqlen_k) {}

  int64_t position(int64_t row) const { return row / group; }
  int64_t head(int64_t row) const { return first_head + row % group; }
  int64_t statistic(int64_t position, int64_t head) const {  // index into lse, and of a pair in statistics
    return (batch * p.num_heads + head) * p.seqlen_q + position;
  }
  char* tensor_row(const StridedView& v, int64_t position, int64_t head) const {
    return static_cast<char*>(v.data) + (batch * v.stride[0] + position * v.stride[1] + head * v.stride[2]) *
                                            static_cast<int64_t>(size_of(v.dtype));
  }
  const char* score_row(const StridedView& v, int64_t position, int64_t head) const {
    return static_cast<const char*>(v.data) + (batch * v.stride[0] + head * v.stride[1] + position * v.stride[2]) *
                                                  static_cast<int64_t>(size_of(v.dtype));
  }
  // First element of key or value j.
  const char* key_row(const StridedView& v, int64_t j) const {
    return static_cast<const char*>(v.data) +
           (batch * v.stride[0] + j * v.stride[1] + kv_head * v.stride[2]) * static_cast<int64_t>(size_of(v.dtype));
  }
  // Keys that any of the rows [begin, end) sees.
  KeyRange keys_seen(int64_t begin, int64_t end) const {
    const int64_t valid_end = length_q * group < end ? length_q * group : end;
    if (begin >= valid_end) return {0, 0};
    return {key_range(p.mask, position(begin), length_q, length_k).begin,
            key_range(p.mask, position(valid_end - 1), length_q, length_k).end};
  }
};

// What forward leaves of a row besides out = o / l: m, l, and lse = m + ln l if it is wanted. A row without a key has
// l = 0 and gets out 0, lse -inf, and 0 for m, so that no infinity appears which nobody asked for.
template <class T>
void store_statistics(const HeadRows& r, int64_t position, int64_t head, T m, T l) {
  const int64_t at = r.statistic(position, head);
  if (T* const statistics = static_cast<T*>(r.p.statistics)) {
    statistics[2 * at] = l == 0 ? T{0} : m;
    statistics[2 * at + 1] = l;
  }
  if (T* const lse = static_cast<T*>(r.p.lse))
    lse[at] = l == 0 ? -kInfinity<T> : static_cast<T>(static_cast<double>(m) + std::log(static_cast<double>(l)));
}

template <class T>
void finish_row(const HeadRows& r, int64_t position, int64_t head, T m, T l, const T* o) {
  const AttentionParams& p = r.p;
  store_row<T>(p.out.dtype, r.tensor_row(p.out, position, head),
               p.out.stride[3] * static_cast<int64_t>(size_of(p.out.dtype)), p.value_dim, o, l == 0 ? T{0} : T{1} / l);
  store_statistics(r, position, head, m, l);
}

// How many tiles of 1 to kMaxVectors vectors the rows are cut into, as evenly as possible: a lone narrow tile at the
// end would leave most of the register file idle.
template <class T>
struct Tiling {
  int64_t vectors, tiles;
  explicit Tiling(int64_t rows)
      : vectors((rows + Simd<T>::width - 1) / Simd<T>::width), tiles((vectors + kMaxVectors - 1) / kMaxVectors) {}
  int64_t first_vector(int64_t tile) const {
    if (tiles == 0) return 0;
    const int64_t each = vectors / tiles, extra = vectors % tiles;
    return tile * each + (tile < extra ? tile : extra);
  }
  int64_t first_row(int64_t tile) const { return first_vector(tile) * Simd<T>::width; }
};

template <class T>
struct RowTile {
  static constexpr int max_lanes = kMaxVectors * Simd<T>::width;

  int nv, lanes, rows;          // vectors, nv * width, and the lanes in use
  int64_t first;                // row of lane 0
  int64_t begin, end;           // keys that some row sees
  int64_t all_begin, all_end;   // keys that every row sees, as far as intervals say
  int64_t lo[max_lanes], hi[max_lanes];          // interval per lane, empty for lanes not in use
  uint32_t position[max_lanes], head[max_lanes];  // of the lane's row (those not in use repeat the last)

  void setup(const HeadRows& r, const Tiling<T>& tiling, int64_t tile) {
    nv = static_cast<int>(tiling.first_vector(tile + 1) - tiling.first_vector(tile));
    lanes = nv * Simd<T>::width;
    first = tiling.first_row(tile);
    rows = static_cast<int>(r.count - first < lanes ? r.count - first : lanes);
    const KeyRange seen = r.keys_seen(first, first + rows);
    begin = seen.begin;
    end = seen.end;
    all_begin = 0;
    all_end = r.length_k;
    int64_t at = r.position(first), in_group = first - at * r.group;  // stepped along: a division a lane would show
    for (int i = 0; i < lanes; ++i) {
      position[i] = static_cast<uint32_t>(at);
      head[i] = static_cast<uint32_t>(r.first_head + in_group);
      const KeyRange range = key_range(r.p.mask, at, r.length_q, r.length_k);
      lo[i] = range.begin;
      hi[i] = i < rows ? range.end : range.begin;
      if (i < rows) {
        if (range.begin > all_begin) all_begin = range.begin;
        if (range.end < all_end) all_end = range.end;
        if (range.begin >= range.end) all_end = 0;
      }
      if (i + 1 < rows && ++in_group == r.group) {
        in_group = 0;
        ++at;
      }
    }
  }

  bool all_see(int64_t k0, int64_t k1) const { return all_begin <= k0 && k1 <= all_end; }

  // row[i] = the start of lane i's row in a view.
  void tensor_rows(const HeadRows& r, const StridedView& v, char** row) const {
    for (int i = 0; i < rows; ++i) row[i] = r.tensor_row(v, position[i], head[i]);
  }
};

// Whether the copies of all keys and values of a head are kept for a task; see kKeptKeysBytes.
template <class T>
bool keeps_keys(const AttentionParams& p) {
  return p.seqlen_k * (p.head_dim + p.value_dim) * static_cast<int64_t>(sizeof(T)) <= kKeptKeysBytes;
}

// The keys or the values of one head as rows of T, a block at a time: in place when the memory already is that, else
// copied. Copies pay when several tiles share them, even of the same type: BSHD rows lie num_heads * dim apart, often
// a multiple of 4 KiB, where the rows of a block would fight for a few cache sets.
template <class T>
class KeyBlock {
 public:
  // Scratch for `dim` columns: rows, and for kept copies one flag per block.
  static int64_t bytes(const AttentionParams& p, int64_t dim) {
    return Arena::bytes<T>(copies(p) * kBlockKeys * dim) + Arena::bytes<char>(copies(p));
  }

  KeyBlock(const HeadRows& r, const StridedView& v, int64_t dim, bool shared, Arena* arena)
      : rows_(r), view_(v), dim_(dim), stride_(v.stride[3] * static_cast<int64_t>(size_of(v.dtype))),
        in_place_(v.dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32) && v.stride[3] == 1 &&
                  (!shared || v.stride[1] == dim)),
        kept_(shared && keeps_keys<T>(r.p)) {
    copy_ = arena->take<T>(copies(r.p) * kBlockKeys * dim);
    copied_ = arena->take<char>(copies(r.p));
    memset(copied_, 0, copies(r.p));
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
      const int64_t block = k0 / kBlockKeys, first = block * kBlockKeys;
      if (!copied_[block]) {
        const int64_t end = first + kBlockKeys < rows_.length_k ? first + kBlockKeys : rows_.length_k;
        copy(first, end, copy_ + first * dim_);
        copied_[block] = 1;
      }
      data_ = copy_ + k0 * dim_;
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
    for (int64_t j = k0; j < k1; ++j, to += dim_)
      load_row<T>(view_.dtype, rows_.key_row(view_, j), stride_, dim_, false, to);
  }

  const HeadRows& rows_;
  const StridedView& view_;
  int64_t dim_, stride_, begin_ = 0, end_ = 0, ld_ = 0;
  bool in_place_, kept_;
  T* copy_;
  char* copied_;
  const T* data_ = nullptr;
  Finite finite_ = Finite::kUnknown;
};

}  // namespace
}  // namespace cpu
}  // namespace attn_ops
