// A few rows of a head that pass its keys together, and blocks of those: what head_lanes.h works on.
#pragma once

#include <new>
#include <type_traits>

#include "kernels.h"
#include "row_tile.h"
#include "scores.h"

namespace attn_ops::cpu {
namespace {

// Rows that share one pass over the keys, at most.
template <class T>
constexpr int kSharedRows = Simd<T>::width < 4 ? Simd<T>::width : 4;

// Whether a call takes this way: there, a row tile would leave lanes empty or be too small, and keys and values are
// rows that vectors can load.
template <class T>
bool few_rows(const AttentionParams& p) {
  return p.seqlen_q * group_size(p) <= 2 * kSharedRows<T> && p.k.stride[3] == 1 && p.v.stride[3] == 1;
}

// Rows that a group of so many is computed as: tiles of other heights are not compiled.
template <class T>
constexpr int places(int rows) {
  return rows <= 2 ? rows : kSharedRows<T>;
}

// Vectors that are read of a row at a time, as long as there are so many. Two of bfloat16 hold the columns at even and at odd
// places (BFloat16::load_apart), and so do the queries and the results of such a call.
template <class Storage>
constexpr int kVectorsAtOnce = std::is_same_v<Storage, BFloat16> ? 2 : 1;

template <class T, class Storage>
ATTN_INLINE void load_vectors(Storage storage, const char* at, Vec<T>* x) {
  if constexpr (kVectorsAtOnce<Storage> == 2) storage.load_apart(at, x);
  else x[0] = storage.load(at);
}

// The columns of a row in the order in which keys and values of dtype t are read, or back from there.
template <class T>
void order_columns(DType t, T* row, int64_t dim, bool back) {
  constexpr int W = Simd<T>::width;
  if (t != DType::kBFloat16) return;
  for (; dim >= 2 * W; dim -= 2 * W, row += 2 * W) {
    T ordered[2 * W];
    for (int i = 0; i < W; ++i)  // a loop each: the compiler makes shuffles of them
      for (int odd = 0; odd < 2; ++odd) {
        if (back) ordered[2 * i + odd] = row[odd * W + i];
        else ordered[odd * W + i] = row[2 * i + odd];
      }
    memcpy(row, ordered, sizeof ordered);
  }
}

// A row of `size` numbers, which are bfloat16, as pairs of neighbours, and zeros behind them.
inline void pair_columns(float* row, int64_t size) {
  char* const pairs = reinterpret_cast<char*>(row);
  for (int64_t d = 0; d < size; d += Simd<float>::width)
    BFloat16::store(pairs + d * BFloat16::size, Simd<float>::load(row + d));
  memset(pairs + size * BFloat16::size, 0, size * BFloat16::size);
}

// Rows of the group of a list of `count` that begins at `first`.
template <class T>
int rows_of_group(int64_t count, int64_t first) {
  return static_cast<int>(count - first < kSharedRows<T> ? count - first : kSharedRows<T>);
}

// Up to kSharedRows rows of one head. What is there of each of its places is its part of a HeadLanesScratch's; places
// without a row have q = 0.
template <class E, class T = Accumulator<E>>
struct RowGroup {
  const HeadRows* head_rows;
  int64_t first;  // row of the head
  int rows;
  uint32_t position[kSharedRows<T>], head[kSharedRows<T>];
  KeyRange seen[kSharedRows<T>];
  KeyRange all_see;  // keys that are seen by every row; empty where more than intervals may hide one
  Visibility visible;  // of the block of keys that is being computed
  E* q;       // [place][head_dim], rows as far apart as those of numbers
  T* out;     // [place][value_dim], padded to whole vectors
  T* scores;  // [place][kHeadLanesKeys], which become probabilities
  T *m, *correction;
  Vec<T>* l;  // one sum per lane until the end

  void start(const HeadRows& r, int64_t first_row) {
    using S = Simd<T>;
    const AttentionParams& p = r.p;
    const Vec<T> factor = S::set1(Scale<E>(p.scale).of_q);
    const int64_t stride = p.q.step();
    const int64_t head_size = round_to_width<T>(p.head_dim), value_size = round_to_width<T>(p.value_dim);
    head_rows = &r;
    first = first_row;
    rows = rows_of_group<T>(r.count, first);
    const int all = places<T>(rows);
    memset(q, 0, sizeof(E) * all * head_size);
    memset(out, 0, sizeof(T) * all * value_size);
    all_see = {0, hides_by_bits(p) || added_may_hide(p) ? 0 : r.length_k};
    for (int i = 0; i < all; ++i) {
      const int64_t row = first + (i < rows ? i : rows - 1);
      position[i] = static_cast<uint32_t>(r.position(row));
      head[i] = static_cast<uint32_t>(r.head(row));
      seen[i] = r.seen_at(position[i]);
      if (seen[i].begin > all_see.begin) all_see.begin = seen[i].begin;
      if (seen[i].end < all_see.end) all_see.end = seen[i].end;
      m[i] = -kInfinity<T>;
      l[i] = S::zero();
      if (i >= rows) continue;
      T* const to = reinterpret_cast<T*>(q + i * head_size);
      load_row<T>(p.q.dtype, r.tensor_row(p.q, position[i], head[i]), stride, p.head_dim, true, to);
      for (int64_t d = 0; d < head_size; d += S::width) S::store(to + d, S::load(to + d) * factor);
      if constexpr (kOfPairs<E>) pair_columns(to, head_size);
      else order_columns(p.k.dtype, to, p.head_dim, false);
    }
  }

  T total(int i) const {
    T sum = 0;
    for (int lane = 0; lane < Simd<T>::width; ++lane) sum += l[i][lane];
    return sum;
  }
};

// The groups of a task, and what is there of each place of all of them, one group's behind the other's.
template <class E, class T = Accumulator<E>>
struct HeadLanesScratch {
  HeadRows* heads;
  RowGroup<E>* groups;  // [head][group]
  int64_t per_head, places;
  int64_t keys;  // of a block: more of them where there are few places
  T *scores, *m, *correction;  // padded to whole vectors of places
  Vec<T>* l;
  T* factors;  // of dropout, [key][row] of a group

  static int64_t groups_of(const AttentionParams& p) {
    return (p.seqlen_q * group_size(p) + kSharedRows<T> - 1) / kSharedRows<T>;
  }
  static int64_t places_of(const AttentionParams& p) {
    const int64_t rows = p.seqlen_q * group_size(p), whole = (groups_of(p) - 1) * kSharedRows<T>;
    return whole + cpu::places<T>(rows_of_group<T>(rows, whole));
  }

  static int64_t bytes(const AttentionParams& p, int64_t heads) {
    const int64_t groups = heads * groups_of(p), places = heads * places_of(p), padded = round_to_width<T>(places);
    return Arena::bytes<HeadLanesScratch>(1) + Arena::bytes<HeadRows>(heads) + Arena::bytes<RowGroup<E>>(groups) +
           Arena::bytes<E>(places * round_to_width<T>(p.head_dim)) +
           Arena::bytes<T>(places * round_to_width<T>(p.value_dim)) + Arena::bytes<T>(places * kHeadLanesKeys) +
           2 * Arena::bytes<T>(padded) + Arena::bytes<Vec<T>>(places) + Arena::bytes<T>(kSharedRows<T> * kHeadLanesKeys);
  }

  static HeadLanesScratch& in(const AttentionParams& p, const HeadLanesTask& task, Arena* arena) {
    HeadLanesScratch& scratch = *arena->take<HeadLanesScratch>(1);
    const int64_t heads = task.head_end - task.head_begin;
    const int64_t head_size = round_to_width<T>(p.head_dim), value_size = round_to_width<T>(p.value_dim);
    scratch.per_head = groups_of(p), scratch.places = heads * places_of(p);
    scratch.keys = head_lanes_keys(size_of(p.k.dtype));
    for (int64_t doubled = 2 * scratch.places; doubled <= Simd<T>::width && scratch.keys < kHeadLanesKeys; doubled *= 2)
      scratch.keys *= 2;
    scratch.heads = arena->take<HeadRows>(heads);
    scratch.groups = arena->take<RowGroup<E>>(heads * scratch.per_head);
    E* const q = arena->take<E>(scratch.places * head_size);
    T* const out = arena->take<T>(scratch.places * value_size);
    scratch.scores = arena->take<T>(scratch.places * kHeadLanesKeys);
    scratch.m = arena->take<T>(round_to_width<T>(scratch.places));
    scratch.correction = arena->take<T>(round_to_width<T>(scratch.places));
    scratch.l = arena->take<Vec<T>>(scratch.places);
    scratch.factors = arena->take<T>(kSharedRows<T> * kHeadLanesKeys);
    int64_t place = 0;
    for (int64_t h = 0; h < heads; ++h) {
      new (&scratch.heads[h]) HeadRows(p, task.batch, task.head_begin + h);
      for (int64_t g = 0; g < scratch.per_head; ++g) {
        RowGroup<E>& f = scratch.groups[h * scratch.per_head + g];
        f.q = q + place * head_size, f.out = out + place * value_size;
        f.scores = scratch.scores + place * kHeadLanesKeys;
        f.m = scratch.m + place, f.correction = scratch.correction + place, f.l = scratch.l + place;
        f.start(scratch.heads[h], g * kSharedRows<T>);
        place += cpu::places<T>(f.rows);
      }
    }
    for (; place < round_to_width<T>(scratch.places); ++place) scratch.m[place] = -kInfinity<T>;
    return scratch;
  }
};

// Keys and values `first` .. first + n: where those of kv head 0 begin, n rows stride[1] apart.
struct KeyBlock {
  int64_t first, n;
  const char *keys, *values, *k_scales, *v_scales;  // scales null where there are none

  KeyBlock(const AttentionParams& p, int64_t batch, int64_t first_key, int64_t end, int64_t most)
      : first(first_key), n(neighbours_end(p, first, end) - first), keys(nullptr), values(nullptr), k_scales(nullptr),
        v_scales(nullptr) {
    if (n <= 0) return;
    if (n > most) n = most;
    keys = key_position(p, p.k, batch, first);
    values = key_position(p, p.v, batch, first);
    if (!p.k_scales.data) return;
    k_scales = key_position(p, p.k_scales, batch, first);
    v_scales = key_position(p, p.v_scales, batch, first);
  }
};

}  // namespace
}  // namespace attn_ops::cpu
