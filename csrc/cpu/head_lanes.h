// Forward for few rows, a decode step above all: the head dimension in the lanes, keys and values read as they lie.
//
// A row tile (row_lanes.h) would have most of its lanes empty. Here, for up to 4 rows i and a block of keys j,
//   s[i][j] = sum_d q'[i][d] k[j][d]                 vectors along d, `width` sums at a time reduced by a transposition
//   m' = max(m, max_j s),  p = e^(s - m')            vectors along the keys
//   o[i][d] = e^(m - m') o + sum_j p[i][j] v[j][d]   vectors along d
// Memory is the limit, so a task takes a block of keys for all its heads before the next block, and asks for the next
// block in the order it lies in memory: DRAM and TLB see one long read, whatever the layout. Half precision is widened
// in registers, and half as many bytes are read. Each of the three steps is done for all heads before the next one: a
// row's way from its scores to its sums is a chain of some 400 cycles, and of one head alone nothing would run beside it.
// Of pairs (simd.h) scores and, where all rows see a block, values are sums of products of pairs, with weights in bfloat16.
#pragma once

#include <new>
#include <type_traits>

#include "kernels.h"
#include "row_tile.h"
#include "rows_ahead.h"
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
    for (int i = 0; i < 2 * W; ++i) {
      const int apart = i % 2 * W + i / 2;
      ordered[back ? i : apart] = row[back ? apart : i];
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

// f.scores[i][j] for R rows and a block of n keys. A tile is R rows by width / R keys: `width` sums of vectors, which
// end in the lanes of one. Of its keys up to four are computed at a time: the addresses of more would not stay in registers.
template <class E, int R, class Storage>
ATTN_INLINE void raw_scores(Storage storage, const RowGroup<E>& f, const KeyBlock& block, RowsAhead& ahead) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  using P = Product<E>;
  constexpr int W = S::width, K = W / R, kAtOnce = K < 4 ? K : 4, kVectors = kVectorsAtOnce<Storage>;
  static_assert(head_lanes_keys(Storage::size / P::numbers) % K == 0, "a tile must not write past the block");
  const AttentionParams& p = f.head_rows->p;
  const int64_t q_size = round_to_width<T>(p.head_dim), columns = elements<E>(p.head_dim);
  const int64_t n = block.n, stride = p.k.stride[1] * size_of(p.k.dtype);
  const char* row = block.keys + f.head_rows->kv_head * p.k.stride[2] * size_of(p.k.dtype);
  const Vec<T> factor = S::set1(Scale<E>(p.scale).of_scores);
  for (int64_t j = 0; j < n; j += K, row += K * stride) {
    ahead.ask(K * ahead.row_bytes());
    Vec<T> acc[W];  // [row][key]
#pragma GCC unroll 4
    for (int t0 = 0; t0 < K; t0 += kAtOnce) {
      const char* key[kAtOnce];
      for (int t = 0; t < kAtOnce; ++t) key[t] = row + (t0 + t) * stride;
      if (j + K > n)  // what is past the keys is as the last of them
        for (int t = 0; t < kAtOnce; ++t)
          if (j + t0 + t >= n) key[t] = row + (n - 1 - j) * stride;
      for (int t = 0; t < kAtOnce; ++t) ahead.ask_next_head(key[t], ahead.row_bytes());
      Vec<T> sum[R][kAtOnce] = {};
      const auto add = [&](int64_t d, auto vectors, const auto& load) {
        constexpr int NV = decltype(vectors)::value;
        Vec<T> k[kAtOnce][NV];
        for (int t = 0; t < kAtOnce; ++t) load(key[t] + d * Storage::size, k[t]);
        for (int v = 0; v < NV; ++v)
          for (int i = 0; i < R; ++i) {
            const typename P::V q = S::kept(P::load(f.q + i * q_size + d + v * W));
            for (int t = 0; t < kAtOnce; ++t) sum[i][t] = P::add(q, k[t][v], sum[i][t]);
          }
      };
      int64_t d = 0;
      for (; d + kVectors * W <= columns; d += kVectors * W)
        add(d, Vectors<kVectors>{}, [&](const char* at, Vec<T>* k) { load_vectors<T>(storage, at, k); });
      for (; d < columns; d += W)
        add(d, Vectors<1>{},
            [&](const char* at, Vec<T>* k) { *k = load_some<T>(storage, at, Storage::size, columns - d); });
      for (int i = 0; i < R; ++i)
        for (int t = 0; t < kAtOnce; ++t) acc[i * K + t0 + t] = sum[i][t];
    }
    const Vec<T> summed = sums<T>(acc);
    T sum[W];
    S::store(sum, kOfPairs<E> ? summed * factor : summed);
    for (int i = 0; i < R; ++i) memcpy(f.scores + i * kHeadLanesKeys + j, sum + i * K, K * sizeof(T));
  }
}

// f.scores[i][j] = times(f.scores[i][j], scale of key or value j) for the rows of a group and a block of n int8 keys or values, of whose
// scales kv head 0 has its first one at `first`. The scores of int8 keys are made before they are multiplied, and so are the
// sums over int8 values: a row of the cache is never there as floats.
template <class T, class Times>
ATTN_INLINE void scale_block(const RowGroup<T>& f, const StridedView& view, const char* first, int64_t n,
                             const Times& times) {
  using S = Simd<T>;
  const float* const of_head = reinterpret_cast<const float*>(first) + f.head_rows->kv_head * view.stride[2];
  const int64_t stride = view.stride[1];
  T scales[kHeadLanesKeys];
  for (int64_t j = 0; j < n; ++j) scales[j] = static_cast<T>(of_head[j * stride]);
  for (int64_t j = n; j < round_to_width<T>(n); ++j) scales[j] = 0;
  for (int i = 0; i < f.rows; ++i)
    for (int64_t j = 0; j < n; j += S::width) {
      T* const at = f.scores + i * kHeadLanesKeys + j;
      S::store(at, times(S::load(at), S::load(scales + j)));
    }
}

// out[i] = correction[i] out[i] + sum_j p[i][j] v[j], a panel of d after the other. A few keys at a time where panels share
// lines of the cache: rows a multiple of 4 KiB apart share its sets, and a whole block of them would not stay in L1 from one
// panel to the next. (And for one row, so that its few sums are no chain as long as the block.) With `hides`, a zero
// probability leaves its value out: the key may be hidden from the row, and what it holds be Inf or NaN. Columns before
// `first_column` are left as they are.
template <class E, int R, bool hides, class Storage>
ATTN_INLINE void add_values(Storage storage, const RowGroup<E>& f, const KeyBlock& block, int64_t first_column,
                            RowsAhead& ahead) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  constexpr int W = S::width, kPanel = kVectorRegisters == 32 ? 4 : 2;
  constexpr int kKeys = R > 1 && kPanel * W * Storage::size >= 64 ? kHeadLanesKeys : Storage::size == 1 ? 16 : 8;
  constexpr int kVectors = kVectorsAtOnce<Storage>, kAsked = R > 1 ? 4 : kKeys;
  const AttentionParams& p = f.head_rows->p;
  const int64_t n = block.n, stride = p.v.stride[1] * Storage::size, out_size = round_to_width<T>(p.value_dim);
  const char* const first = block.values + f.head_rows->kv_head * p.v.stride[2] * Storage::size;
  for (int64_t j0 = 0; j0 < n; j0 += kKeys) {
    const int64_t keys = n - j0 < kKeys ? n - j0 : kKeys;
    const char* const values = first + j0 * stride;
    const auto panel = [&](int64_t d, auto vectors, const auto& load) {
      constexpr int NV = decltype(vectors)::value;
      Vec<T> acc[R][NV];
      for (int i = 0; i < R; ++i)
        for (int v = 0; v < NV; ++v) {
          acc[i][v] = S::load(f.out + i * out_size + d + v * W);
          if (j0 == 0) acc[i][v] *= S::set1(f.correction[i]);
        }
      const char* at = values + d * Storage::size;
      for (int64_t j = 0; j < keys; ++j, at += stride) {
        if (j % kAsked == 0) ahead.ask((keys - j < kAsked ? keys - j : kAsked) * NV * W * Storage::size);
        ahead.ask_next_head(at, NV * W * Storage::size);
        Vec<T> x[NV];
        load(at, x);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          const T weight = f.scores[i * kHeadLanesKeys + j0 + j];
          if (hides && weight == 0) continue;
          for (int v = 0; v < NV; ++v) acc[i][v] = S::fma(S::set1(weight), x[v], acc[i][v]);
        }
      }
      for (int i = 0; i < R; ++i)
        for (int v = 0; v < NV; ++v) S::store(f.out + i * out_size + d + v * W, acc[i][v]);
    };
    const auto whole = [&](const char* at, auto& x) {
      constexpr int NV = sizeof x / sizeof x[0];
      for (int v = 0; v < NV; v += kVectors) load_vectors<T>(storage, at + v * W * Storage::size, x + v);
    };
    int64_t d = first_column;
    for (; d + kPanel * W <= p.value_dim; d += kPanel * W) panel(d, Vectors<kPanel>{}, whole);
    for (; d + kVectors * W <= p.value_dim; d += kVectors * W) panel(d, Vectors<kVectors>{}, whole);
    for (; d < p.value_dim; d += W)
      panel(d, Vectors<1>{},
            [&](const char* at, auto& x) { x[0] = load_some<T>(storage, at, Storage::size, p.value_dim - d); });
  }
}

// The same for the columns that bfloat16 is read apart in, by products of pairs of two keys; returns how many those are.
template <class E, int R>
ATTN_INLINE int64_t add_value_pairs(const RowGroup<E>& f, const KeyBlock& block, RowsAhead& ahead) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  using P = Product<E>;
  using Words = BFloat16::Words;
  constexpr int W = S::width;
  const AttentionParams& p = f.head_rows->p;
  const int64_t n = block.n, stride = p.v.stride[1] * BFloat16::size, out_size = round_to_width<T>(p.value_dim);
  const char* const first = block.values + f.head_rows->kv_head * p.v.stride[2] * BFloat16::size;
  E weights[R][kHeadLanesKeys / 2 + W];  // of two keys; of more than there are: 0
  for (int i = 0; i < R; ++i)
    for (int64_t j = 0; j < n; j += 2 * W) {
      const T* const at = f.scores + i * kHeadLanesKeys + j;
      P::store_neighbours(weights[i] + j / 2, weights[i] + j / 2 + W / 2, S::load(at),
                          j + W < n ? S::load(at + W) : S::zero());
    }
  const auto panel = [&](int64_t d, auto pairs) {
    constexpr int NP = decltype(pairs)::value;  // of vectors
    Vec<T> acc[R][2 * NP];
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < 2 * NP; ++v)
        acc[i][v] = S::load(f.out + i * out_size + d + v * W) * S::set1(f.correction[i]);
    const char* at = first + d * BFloat16::size;
    for (int64_t j = 0; j < n; j += 2, at += 2 * stride) {
      const bool both = j + 1 < n;
      ahead.ask((both ? 2 : 1) * 2 * NP * W * BFloat16::size);
      ahead.ask_next_head(at, 2 * NP * W * BFloat16::size);
      if (both) ahead.ask_next_head(at + stride, 2 * NP * W * BFloat16::size);
      typename P::V x[2 * NP];
      for (int v = 0; v < NP; ++v) {
        Words one, other{};
        memcpy(&one, at + v * sizeof one, sizeof one);
        if (both) memcpy(&other, at + stride + v * sizeof other, sizeof other);
        x[2 * v] = (typename P::V)((one & 0xffffu) | other << 16);
        x[2 * v + 1] = (typename P::V)(one >> 16 | (other & 0xffff0000u));
      }
      for (int i = 0; i < R; ++i) {
        const typename P::V weight = P::set1(weights[i] + j / 2);
        for (int v = 0; v < 2 * NP; ++v) acc[i][v] = P::add(weight, x[v], acc[i][v]);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < 2 * NP; ++v) S::store(f.out + i * out_size + d + v * W, acc[i][v]);
  };
  int64_t d = 0;
  for (; d + 4 * W <= p.value_dim; d += 4 * W) panel(d, Vectors<2>{});
  for (; d + 2 * W <= p.value_dim; d += 2 * W) panel(d, Vectors<1>{});
  return d;
}

// bits[i]: which of the keys k0 .. k0 + n row i sees, by intervals, ids, blocks and boolean masks; kNothing also where a
// bias of -inf hides all, kSome wherever there is one.
template <class E>
__attribute__((noinline)) Visibility visible_keys(const RowGroup<E>& f, int64_t k0, int64_t n, uint64_t* bits) {
  const HeadRows& r = *f.head_rows;
  if (r.p.bias.data && bias_hides_all<Accumulator<E>>(r, f, k0, n)) return Visibility::kNothing;
  uint64_t any = 0, every = bits_between(0, n);
  for (int i = 0; i < f.rows; ++i) {
    bits[i] = bits_between(f.seen[i].begin - k0, f.seen[i].end - k0) &
              row_bits(r, f.position[i], f.head[i], k0, n, [](const StridedView&) { return true; }) &
              structure_bits(r, f.position[i], f.head[i], k0, n);
    any |= bits[i];
    every &= bits[i];
  }
  if (!any) return Visibility::kNothing;
  return every == bits_between(0, n) && !added_may_hide(r.p) ? Visibility::kAll : Visibility::kSome;
}

// The scores of a group, with all that is added to them and without the keys that its rows do not see: those are -inf, and
// so is what lies behind the keys.
template <class E, int R, class Storage>
__attribute__((noinline)) void score_group(Storage storage, RowGroup<E>& f, const KeyBlock& block, int64_t keys,
                                           RowsAhead& ahead) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  const AttentionParams& p = f.head_rows->p;
  const int64_t k0 = block.first, n = block.n;
  uint64_t bits[kSharedRows<T>];
  const bool whole = f.all_see.begin <= k0 && k0 + n <= f.all_see.end;
  f.visible = whole ? Visibility::kAll : visible_keys<E>(f, k0, n, bits);
  int64_t known = 0;
  if (f.visible != Visibility::kNothing) {
    if constexpr (kOfPairs<E>) raw_scores<E, R>(Same<T>{}, f, block, ahead);
    else raw_scores<E, R>(storage, f, block, ahead);
    if constexpr (std::is_same_v<Storage, Int8>)
      scale_block<T>(f, p.k_scales, block.k_scales, n, [](Vec<T> score, Vec<T> scale) { return score * scale; });
    if (f.visible == Visibility::kSome || n % S::width != 0 || !plain_scores(p)) {
      for (int i = 0; i < f.rows; ++i)
        finish_row_scores<T>(*f.head_rows, f.position[i], f.head[i], k0, n, whole ? bits_between(0, n) : bits[i],
                             f.scores + i * kHeadLanesKeys);
    }
    known = round_to_width<T>(n);
  }
  for (int64_t j = known; j < keys; j += S::width)
    for (int i = 0; i < R; ++i) S::store(f.scores + i * kHeadLanesKeys + j, S::set1(-kInfinity<T>));
}

// scores -> probabilities relative to the new maximum, before dropout, of `count` places from `first` on, up to a vector of
// them; updates m, l, correction.
template <class E>
ATTN_INLINE void softmax_places(const HeadLanesScratch<E>& scratch, int64_t first, int64_t count) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  constexpr int W = S::width;
  const int64_t keys = scratch.keys;
  T* const scores = scratch.scores + first * kHeadLanesKeys;
  Vec<T> highest[W];
  for (int i = 0; i < W; ++i) {
    const T* const s = scores + (i < count ? i : count - 1) * kHeadLanesKeys;
    highest[i] = S::load(s);
    for (int64_t j = W; j < keys; j += W) highest[i] = S::max(highest[i], S::load(s + j));
  }
  const Vec<T> m_old = S::load(scratch.m + first), m = S::max(m_old, maxima<T>(highest)), base = softmax_base<T>(m);
  S::store(scratch.m + first, m);
  T bases[W], corrections[W];
  S::store(bases, base);
  S::store(corrections, exp<T>(m_old - base));
  memcpy(scratch.correction + first, corrections, sizeof corrections);
  for (int64_t i = 0; i < count; ++i) {
    T* const s = scores + i * kHeadLanesKeys;
    Vec<T> sum = S::zero();
    for (int64_t j = 0; j < keys; j += W) {
      const Vec<T> e = exp<T>(S::load(s + j) - S::set1(bases[i]));
      sum += e;
      S::store(s + j, e);
    }
    scratch.l[first + i] = S::fma(scratch.l[first + i], S::set1(corrections[i]), sum);
  }
}

// out of a group, from its probabilities.
template <class E, int R, class Storage>
__attribute__((noinline)) void value_group(Storage storage, RowGroup<E>& f, const KeyBlock& block, RowsAhead& ahead,
                                           Accumulator<E>* factors) {
  using T = Accumulator<E>;
  const AttentionParams& p = f.head_rows->p;
  const int64_t n = block.n;
  if (f.visible == Visibility::kNothing) return;  // and out stays as it was: corrections are 1, or out is 0
  if (p.dropout_rate > 0) {  // after the sum: dropout acts on the normalised probabilities
    dropout_factors<T>(Dropout(p, f.head_rows->batch), f.position, f.head, f.rows, block.first, n, factors);
    for (int i = 0; i < f.rows; ++i)
      for (int64_t j = 0; j < n; ++j) f.scores[i * kHeadLanesKeys + j] *= factors[j * f.rows + i];
  }
  if constexpr (std::is_same_v<Storage, Int8>) {
    // A probability of 0 stays so, whatever the scale is: that of a hidden value may be NaN.
    using S = Simd<T>;
    scale_block<T>(f, p.v_scales, block.v_scales, n, [](Vec<T> probability, Vec<T> scale) {
      return S::select(probability == S::zero(), S::zero(), probability * scale);
    });
  }
  if (f.visible == Visibility::kSome) return add_values<E, R, true>(storage, f, block, 0, ahead);
  int64_t done = 0;
  if constexpr (kOfPairs<E>) done = add_value_pairs<E, R>(f, block, ahead);
  add_values<E, R, false>(storage, f, block, done, ahead);
}

// Calls f with as many places as a group of so many rows has.
template <class T, class F>
ATTN_INLINE void with_places(int rows, const F& f) {
  if (rows == 1) f(std::integral_constant<int, 1>{});
  else if (rows == 2) f(std::integral_constant<int, 2>{});
  else f(std::integral_constant<int, kSharedRows<T>>{});
}

// Writes out and the statistics, or m, l and the unnormalised o of a key split.
template <class E, class T = Accumulator<E>>
void finish_row_group(const RowGroup<E>& f, T* partial) {
  const AttentionParams& p = f.head_rows->p;
  for (int i = 0; i < f.rows; ++i) {
    const T l = f.total(i);
    T* const out = f.out + i * round_to_width<T>(p.value_dim);
    order_columns(p.v.dtype, out, p.value_dim, true);
    if (partial) {
      T* const at = partial + (f.first + i) * (p.value_dim + 2);
      at[0] = f.m[i];
      at[1] = l;
      memcpy(at + 2, out, sizeof(T) * p.value_dim);
    } else {
      finish_row<T>(*f.head_rows, f.position[i], f.head[i], f.m[i], l, out);
    }
  }
}

// The keys of a part of the work that its rows see, from a multiple of 4 on: key 4 n starts a group of random numbers.
inline KeyRange keys_of(const AttentionParams& p, const HeadLanesPart& part) {
  if (part.head_begin == part.head_end) return {0, 0};
  const HeadRows first(p, part.batch, part.head_begin);
  KeyRange seen = first.keys_seen(0, first.count);
  if (seen.begin < part.key_begin) seen.begin = part.key_begin;
  if (seen.end > part.key_end) seen.end = part.key_end;
  return {seen.begin / 4 * 4, seen.end};
}

template <class E>
void forward_head_lanes(const AttentionParams& p, const HeadLanesTask& task, void* memory) {
  using T = Accumulator<E>;
  Arena arena(memory);
  const int64_t heads = task.head_end - task.head_begin;
  HeadLanesScratch<E>& scratch = HeadLanesScratch<E>::in(p, task, &arena);
  const int64_t groups = heads * scratch.per_head;
  const KeyRange seen = keys_of(p, task), seen_next = keys_of(p, task.next);

  const int64_t key_bytes = (p.head_dim + p.value_dim) * size_of(p.k.dtype);
  const int64_t block_bytes = scratch.keys * heads * key_bytes;
  const bool fits_l1 = block_bytes <= kL1Bytes / 2;
  const auto run = [&](auto storage) {
    const KeyBlock next_first(p, task.next.batch, seen_next.begin, seen_next.end, scratch.keys);
    KeyBlock block(p, task.batch, seen.begin, seen.end, scratch.keys);
    while (block.n > 0) {
      const KeyBlock next(p, task.batch, block.first + block.n, seen.end, scratch.keys);
      const HeadLanesPart& of = next.n > 0 ? task : task.next;
      const KeyBlock& wanted = next.n > 0 ? next : next_first;
      const auto ahead = [&](const StridedView& v, const char* at, int64_t dim) {
        const char* const first = at + of.head_begin * v.stride[2] * size_of(v.dtype);
        return RowsAhead(v, first, wanted.n, of.head_end - of.head_begin, dim, fits_l1);
      };
      RowsAhead keys_ahead = ahead(p.k, wanted.keys, p.head_dim), values_ahead = ahead(p.v, wanted.values, p.value_dim);
      for (int64_t g = 0; g < groups; ++g)
        with_places<T>(scratch.groups[g].rows, [&](auto places) {
          score_group<E, places.value>(storage, scratch.groups[g], block, scratch.keys, keys_ahead);
        });
      constexpr int W = Simd<T>::width;
      int64_t place = 0;
      for (; place + W <= scratch.places; place += W) softmax_places<E>(scratch, place, W);
      if (place < scratch.places) softmax_places<E>(scratch, place, scratch.places - place);
      for (int64_t g = 0; g < groups; ++g)
        with_places<T>(scratch.groups[g].rows, [&](auto places) {
          value_group<E, places.value>(storage, scratch.groups[g], block, values_ahead, scratch.factors);
        });
      block = next;
    }
  };
  if constexpr (kOfPairs<E>) run(BFloat16{});
  else with_read_storage(T{}, p.k.dtype, run);
  for (int64_t g = 0; g < groups; ++g) {
    char* const partial = static_cast<char*>(task.partials);
    finish_row_group<E>(scratch.groups[g],
                        reinterpret_cast<T*>(partial ? partial + g / scratch.per_head * task.head_bytes : nullptr));
  }
}

}  // namespace
}  // namespace attn_ops::cpu
