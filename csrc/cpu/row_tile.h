// A tile of query rows: which rows they are, which keys they see, and what is left of them at the end.
//
// All query heads that share a key/value head are one list of rows, position-major: row r is position r / group of
// head kv_head * group + r % group. So grouped queries share every key they load, a decode step with 4 heads per
// kv head fills 4 lanes, and the ends of the key ranges still never move back along the list.
#pragma once

#include "../mask.h"
#include "blocking.h"
#include "gemm.h"
#include "math.h"
#include "pack.h"
#include "philox.h"

namespace attn_ops::cpu {
namespace {

// First element of row j of keys or values, of kv head 0.
inline const char* key_position(const AttentionParams& p, const StridedView& v, int64_t batch, int64_t j) {
  if (p.block_table) {
    batch = p.block_table[batch * p.block_table_stride + j / p.page_size];
    j %= p.page_size;
  }
  return static_cast<const char*>(v.data) + (batch * v.stride[0] + j * v.stride[1]) * size_of(v.dtype);
}

// Up to which key, at most `end`, rows from j on lie stride[1] apart.
inline int64_t neighbours_end(const AttentionParams& p, int64_t j, int64_t end) {
  if (!p.block_table) return end;
  const int64_t page_end = j - j % p.page_size + p.page_size;
  return page_end < end ? page_end : end;
}

// The rows of one (batch, kv head), or of one of its query heads alone.
struct HeadRows {
  const AttentionParams& p;
  int64_t batch, kv_head, first_head, group, count, length_q, length_k, shift;

  HeadRows(const AttentionParams& params, int64_t b, int64_t kv) : HeadRows(params, b, kv, kv * group_size(params),
                                                                            group_size(params)) {}
  HeadRows(const AttentionParams& params, int64_t b, int64_t kv, int64_t first, int64_t heads)
      : p(params), batch(b), kv_head(kv), first_head(first), group(heads), count(params.seqlen_q * heads),
        length_q(params.query_lengths ? params.query_lengths[b] : params.seqlen_q),
        length_k(params.key_lengths ? params.key_lengths[b] : params.seqlen_k),
        shift(row_shift(params.mask, b, length_q, length_k)) {}

  int64_t position(int64_t row) const { return row / group; }
  int64_t head(int64_t row) const { return first_head + row % group; }
  // Where a row stands among the keys.
  int64_t own(int64_t position) const { return position + shift; }
  KeyRange seen_at(int64_t position) const {
    return key_range(p.mask, batch, position, own(position), length_q, length_k);
  }
  int64_t statistic(int64_t position, int64_t head) const {  // index into lse, and of a pair in statistics
    return (batch * p.num_heads + head) * p.seqlen_q + position;
  }
  char* tensor_row(const StridedView& v, int64_t position, int64_t head) const {
    return static_cast<char*>(v.data) +
           (batch * v.stride[0] + position * v.stride[1] + head * v.stride[2]) * size_of(v.dtype);
  }
  const char* score_row(const StridedView& v, int64_t position, int64_t head) const {
    return static_cast<const char*>(v.data) +
           (batch * v.stride[0] + head * v.stride[1] + position * v.stride[2]) * size_of(v.dtype);
  }
  // First element of key or value j.
  const char* key_row(const StridedView& v, int64_t j) const {
    return key_position(p, v, batch, j) + kv_head * v.stride[2] * size_of(v.dtype);
  }
  // Of int8 key or value j.
  template <class T>
  T scale(const StridedView& scales, int64_t j) const {
    return static_cast<T>(*reinterpret_cast<const float*>(key_row(scales, j)));
  }
  // Keys that any of the rows [begin, end) sees.
  KeyRange keys_seen(int64_t begin, int64_t end) const {
    const int64_t valid_end = length_q * group < end ? length_q * group : end;
    if (begin >= valid_end) return {0, 0};
    return {seen_at(position(begin)).begin, seen_at(position(valid_end - 1)).end};
  }
};

// Lets the sink of a head join the m and l of a row, and returns what its sums over values are to be scaled with.
template <class T>
T join_sink(const AttentionParams& p, int64_t head, T* m, T* l) {
  if (!p.sinks) return T{1};
  const T sink = static_cast<const T*>(p.sinks)[head];
  if (!(sink > -kInfinity<T>) || *m != *m) return T{1};
  const T highest = sink > *m ? sink : *m;
  const T correction = exp_of(*m - highest);
  *l = *l * correction + exp_of(sink - highest);
  *m = highest;
  return correction;
}

// lse = m + ln l of rows, -inf of those without a key or a sink, which have l = 0.
template <class T>
ATTN_INLINE Vec<T> lse_of(Vec<T> m, Vec<T> l) {
  using S = Simd<T>;
  return S::select(l == S::zero(), S::set1(-kInfinity<T>), plus_log(m, l));
}

// What forward leaves of a row besides out = o / l: m, l, and lse if it is wanted. A row without a key or a sink gets out 0,
// lse -inf, and 0 for m, so that no infinity appears which nobody asked for.
template <class T>
void store_statistics(const HeadRows& r, int64_t position, int64_t head, T m, T l, T lse) {
  const int64_t at = r.statistic(position, head);
  if (T* const statistics = static_cast<T*>(r.p.statistics)) {
    statistics[2 * at] = l == 0 ? T{0} : m;
    statistics[2 * at + 1] = l;
  }
  if (r.p.lse) static_cast<T*>(r.p.lse)[at] = lse;
}

template <class T>
void finish_row(const HeadRows& r, int64_t position, int64_t head, T m, T l, const T* o) {
  const AttentionParams& p = r.p;
  const T correction = join_sink(p, head, &m, &l);
  store_row<T>(p.out.dtype, r.tensor_row(p.out, position, head), p.out.step(), p.value_dim, o,
               l == 0 ? T{0} : correction / l);
  store_statistics(r, position, head, m, l, lse_of<T>(Simd<T>::set1(m), Simd<T>::set1(l))[0]);
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

// Keys that some row of the tiles first .. end sees.
template <class T>
KeyRange keys_seen(const HeadRows& r, const Tiling<T>& tiling, int64_t first, int64_t end) {
  const int64_t end_row = tiling.first_row(end);
  return r.keys_seen(tiling.first_row(first), end_row < r.count ? end_row : r.count);
}

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
      const KeyRange range = r.seen_at(at);
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

}  // namespace
}  // namespace attn_ops::cpu
