// Forward for few rows, a decode step above all: the head dimension in the lanes, keys and values read as they lie.
//
// A row tile (row_lanes.h) would have most of its lanes empty. Here, for up to 4 rows i and a block of keys j,
//   s[i][j] = sum_d q'[i][d] k[j][d]                 vectors along d, `width` sums at a time reduced by a transposition
//   m' = max(m, max_j s),  p = e^(s - m')            vectors along the keys
//   o[i][d] = e^(m - m') o + sum_j p[i][j] v[j][d]   vectors along d
// Memory is the limit, so a task takes a block of keys for all its heads before the next block, and asks for the next
// block in the order it lies in memory: DRAM and TLB see one long read, whatever the layout. Half precision is widened
// in registers, and half as many bytes are read.
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

// Up to kSharedRows rows of one head and their running softmax. Rows not in use have q = 0.
template <class T>
struct RowGroup {
  const HeadRows* head_rows;
  int64_t first;  // row of the head
  int rows;
  uint32_t position[kSharedRows<T>], head[kSharedRows<T>];
  KeyRange seen[kSharedRows<T>];
  KeyRange all_see;  // keys that are seen by every row; empty where more than intervals may hide one
  T m[Simd<T>::width], correction[Simd<T>::width];  // a vector, of which the first kSharedRows count
  Vec<T> l[kSharedRows<T>];  // one sum per lane until the end
  T *q, *out;  // [row][head_dim], [row][value_dim], padded to whole vectors

  void start(const HeadRows& r, int64_t first_row) {
    using S = Simd<T>;
    const AttentionParams& p = r.p;
    const Vec<T> factor = S::set1(static_cast<T>(p.scale));
    const int64_t stride = p.q.step();
    const int64_t head_size = round_to_width<T>(p.head_dim), value_size = round_to_width<T>(p.value_dim);
    head_rows = &r;
    first = first_row;
    rows = static_cast<int>(r.count - first < kSharedRows<T> ? r.count - first : kSharedRows<T>);
    S::store(m, S::set1(-kInfinity<T>));
    memset(q, 0, sizeof(T) * kSharedRows<T> * head_size);
    memset(out, 0, sizeof(T) * kSharedRows<T> * value_size);
    all_see = {0, hides_by_bits(p) || added_may_hide(p) ? 0 : r.length_k};
    for (int i = 0; i < kSharedRows<T>; ++i) {
      const int64_t row = first + (i < rows ? i : rows - 1);
      position[i] = static_cast<uint32_t>(r.position(row));
      head[i] = static_cast<uint32_t>(r.head(row));
      seen[i] = r.seen_at(position[i]);
      if (seen[i].begin > all_see.begin) all_see.begin = seen[i].begin;
      if (seen[i].end < all_see.end) all_see.end = seen[i].end;
      l[i] = S::zero();
      if (i >= rows) continue;
      T* const to = q + i * head_size;
      load_row<T>(p.q.dtype, r.tensor_row(p.q, position[i], head[i]), stride, p.head_dim, true, to);
      for (int64_t d = 0; d < head_size; d += S::width) S::store(to + d, S::load(to + d) * factor);
    }
  }

  T total(int i) const {
    T sum = 0;
    for (int lane = 0; lane < Simd<T>::width; ++lane) sum += l[i][lane];
    return sum;
  }
};

// Row groups of a head.
template <class T>
int64_t row_groups(const AttentionParams& p) {
  return (p.seqlen_q * group_size(p) + kSharedRows<T> - 1) / kSharedRows<T>;
}

template <class T>
struct HeadLanesScratch {
  HeadRows* heads;
  RowGroup<T>* groups;  // [head][group]
  T *scores, *factors;  // [row][kHeadLanesKeys], [key][row]

  static int64_t bytes(const AttentionParams& p, int64_t heads) {
    const int64_t groups = heads * row_groups<T>(p);
    return Arena::bytes<HeadLanesScratch>(1) + Arena::bytes<HeadRows>(heads) + Arena::bytes<RowGroup<T>>(groups) +
           groups * Arena::bytes<T>(kSharedRows<T> * round_to_width<T>(p.head_dim)) +
           groups * Arena::bytes<T>(kSharedRows<T> * round_to_width<T>(p.value_dim)) +
           2 * Arena::bytes<T>(kSharedRows<T> * kHeadLanesKeys);
  }

  static HeadLanesScratch& in(const AttentionParams& p, int64_t heads, Arena* arena) {
    HeadLanesScratch& scratch = *arena->take<HeadLanesScratch>(1);
    const int64_t groups = heads * row_groups<T>(p);
    scratch.heads = arena->take<HeadRows>(heads);
    scratch.groups = arena->take<RowGroup<T>>(groups);
    for (int64_t g = 0; g < groups; ++g) {
      scratch.groups[g].q = arena->take<T>(kSharedRows<T> * round_to_width<T>(p.head_dim));
      scratch.groups[g].out = arena->take<T>(kSharedRows<T> * round_to_width<T>(p.value_dim));
    }
    scratch.scores = arena->take<T>(kSharedRows<T> * kHeadLanesKeys);
    scratch.factors = arena->take<T>(kSharedRows<T> * kHeadLanesKeys);
    return scratch;
  }
};

// Keys and values `first` .. first + n: where those of kv head 0 begin, n rows stride[1] apart.
struct KeyBlock {
  int64_t first, n;
  const char *keys, *values, *k_scales, *v_scales;  // scales null where there are none

  KeyBlock(const AttentionParams& p, int64_t batch, int64_t first_key, int64_t end)
      : first(first_key), n(neighbours_end(p, first, end) - first), keys(nullptr), values(nullptr), k_scales(nullptr),
        v_scales(nullptr) {
    if (n <= 0) return;
    const int64_t most = head_lanes_keys(size_of(p.k.dtype));
    if (n > most) n = most;
    keys = key_position(p, p.k, batch, first);
    values = key_position(p, p.v, batch, first);
    if (!p.k_scales.data) return;
    k_scales = key_position(p, p.k_scales, batch, first);
    v_scales = key_position(p, p.v_scales, batch, first);
  }
};

// scores[i][j] for R rows and a block of n keys. A tile is R rows by width / R keys: `width` sums of vectors, which
// end in the lanes of one.
template <class T, int R, class Storage>
ATTN_INLINE void raw_scores(Storage storage, const RowGroup<T>& f, const KeyBlock& block, RowsAhead& ahead, T* scores) {
  using S = Simd<T>;
  constexpr int W = S::width, K = W / R;
  static_assert(head_lanes_keys(Storage::size) % K == 0, "a tile must not write past the block");
  const AttentionParams& p = f.head_rows->p;
  const int64_t whole = p.head_dim / W * W, q_size = round_to_width<T>(p.head_dim);
  const int64_t n = block.n, stride = p.k.stride[1] * Storage::size;
  const char* row = block.keys + f.head_rows->kv_head * p.k.stride[2] * Storage::size;
  for (int64_t j = 0; j < n; j += K, row += K * stride) {
    const char* key[K];
    for (int t = 0; t < K; ++t) key[t] = row + t * stride;
    for (int t = 1; j + K > n && t < K; ++t)
      if (j + t >= n) key[t] = key[t - 1];
    ahead.ask(K * ahead.row_bytes());
    Vec<T> acc[W];  // [row][key]
    for (int i = 0; i < W; ++i) acc[i] = S::zero();
    const auto add = [&](int64_t d, const auto& load) {
      Vec<T> q[R];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) q[i] = S::kept(S::load(f.q + i * q_size + d));
#pragma GCC unroll 16
      for (int t = 0; t < K; ++t) {
        const Vec<T> k = load(key[t] + d * Storage::size);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) acc[i * K + t] = S::fma(q[i], k, acc[i * K + t]);
      }
    };
    for (int64_t d = 0; d < whole; d += W) add(d, [&](const char* at) { return storage.load(at); });
    if (whole < p.head_dim)
      add(whole, [&](const char* at) { return load_some<T>(storage, at, Storage::size, p.head_dim - whole); });
    T sum[W];
    S::store(sum, sums<T>(acc));
    for (int i = 0; i < R; ++i) memcpy(scores + i * kHeadLanesKeys + j, sum + i * K, K * sizeof(T));
  }
}

// x[i][j] = times(x[i][j], scale of key or value j) for the rows of a group and a block of n int8 keys or values, of whose
// scales kv head 0 has its first one at `first`. The scores of int8 keys are made before they are multiplied, and so are the
// sums over int8 values: a row of the cache is never there as floats.
template <class T, class Times>
ATTN_INLINE void scale_block(const RowGroup<T>& f, const StridedView& view, const char* first, int64_t n, T* x,
                             const Times& times) {
  using S = Simd<T>;
  const float* const of_head = reinterpret_cast<const float*>(first) + f.head_rows->kv_head * view.stride[2];
  const int64_t stride = view.stride[1];
  T scales[kHeadLanesKeys];
  for (int64_t j = 0; j < n; ++j) scales[j] = static_cast<T>(of_head[j * stride]);
  for (int64_t j = n; j < round_to_width<T>(n); ++j) scales[j] = 0;
  for (int i = 0; i < f.rows; ++i)
    for (int64_t j = 0; j < n; j += S::width) {
      T* const at = x + i * kHeadLanesKeys + j;
      S::store(at, times(S::load(at), S::load(scales + j)));
    }
}

// out[i] = correction[i] out[i] + sum_j p[i][j] v[j], a few keys at a time: rows a multiple of 4 KiB apart share
// cache sets, and a whole block of them would not stay in L1 from one panel of d to the next. With `hides`, a zero
// probability leaves its value out: the key may be hidden from the row, and what it holds be Inf or NaN.
template <class T, int R, bool hides, class Storage>
ATTN_INLINE void add_values(Storage storage, const RowGroup<T>& f, const KeyBlock& block, RowsAhead& ahead,
                            const T* probabilities) {
  using S = Simd<T>;
  constexpr int W = S::width, kKeys = Storage::size == 1 ? 16 : 8, kPanel = kVectorRegisters == 32 ? 4 : 2;
  const AttentionParams& p = f.head_rows->p;
  const int64_t n = block.n, stride = p.v.stride[1] * Storage::size, out_size = round_to_width<T>(p.value_dim);
  const char* const first = block.values + f.head_rows->kv_head * p.v.stride[2] * Storage::size;
  for (int64_t j0 = 0; j0 < n; j0 += kKeys) {
    const int64_t keys = n - j0 < kKeys ? n - j0 : kKeys;
    const char* const values = first + j0 * stride;
    const auto panel = [&](int64_t d, auto vectors, const auto& load) {
      constexpr int NV = decltype(vectors)::value;
      ahead.ask(keys * NV * W * Storage::size);
      Vec<T> acc[R][NV];
      for (int i = 0; i < R; ++i)
        for (int v = 0; v < NV; ++v) {
          acc[i][v] = S::load(f.out + i * out_size + d + v * W);
          if (j0 == 0) acc[i][v] *= S::set1(f.correction[i]);
        }
      const char* at = values + d * Storage::size;
      for (int64_t j = 0; j < keys; ++j, at += stride) {
        Vec<T> x[NV];
        for (int v = 0; v < NV; ++v) x[v] = load(at + v * W * Storage::size);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          const T weight = probabilities[i * kHeadLanesKeys + j0 + j];
          if (hides && weight == 0) continue;
          for (int v = 0; v < NV; ++v) acc[i][v] = S::fma(S::set1(weight), x[v], acc[i][v]);
        }
      }
      for (int i = 0; i < R; ++i)
        for (int v = 0; v < NV; ++v) S::store(f.out + i * out_size + d + v * W, acc[i][v]);
    };
    const auto whole = [&](const char* at) { return storage.load(at); };
    int64_t d = 0;
    for (; d + kPanel * W <= p.value_dim; d += kPanel * W) panel(d, Vectors<kPanel>{}, whole);
    for (; d + W <= p.value_dim; d += W) panel(d, Vectors<1>{}, whole);
    if (d < p.value_dim)
      panel(d, Vectors<1>{}, [&](const char* at) { return load_some<T>(storage, at, Storage::size, p.value_dim - d); });
  }
}

// bits[i]: which of the keys k0 .. k0 + n row i sees, by intervals, ids, blocks and boolean masks; kNothing also where a
// bias of -inf hides all, kSome wherever there is one.
template <class T>
__attribute__((noinline)) Visibility visible_keys(const RowGroup<T>& f, int64_t k0, int64_t n, uint64_t* bits) {
  const HeadRows& r = *f.head_rows;
  if (r.p.bias.data && bias_hides_all<T>(r, f, k0, n)) return Visibility::kNothing;
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

// scores -> probabilities relative to the new maximum, before dropout; updates m, l, correction. All rows and keys that
// there is room for, so that nothing waits: scores of rows not in use are 0, and those past the keys -inf.
template <class T, int R, int64_t kKeys>
ATTN_INLINE void row_softmax(RowGroup<T>& f, int64_t k0, int64_t n, Visibility seen, const uint64_t* bits, T* scores) {
  using S = Simd<T>;
  constexpr int W = S::width;
  if (seen == Visibility::kSome || n % W != 0 || !plain_scores(f.head_rows->p)) {
    for (int i = 0; i < f.rows; ++i)
      finish_row_scores<T>(*f.head_rows, f.position[i], f.head[i], k0, n, bits[i], scores + i * kHeadLanesKeys);
  }
  for (int64_t j = round_to_width<T>(n); j < kKeys; j += W)
    for (int i = 0; i < R; ++i) S::store(scores + i * kHeadLanesKeys + j, S::set1(-kInfinity<T>));

  Vec<T> highest[W];
  for (int i = 0; i < W; ++i) {
    const T* const s = scores + (i < R ? i : R - 1) * kHeadLanesKeys;
    highest[i] = S::load(s);
    for (int64_t j = W; j < kKeys; j += W) highest[i] = S::max(highest[i], S::load(s + j));
  }
  const Vec<T> m_old = S::load(f.m), m = S::max(m_old, maxima<T>(highest)), base = softmax_base<T>(m);
  S::store(f.m, m);
  S::store(f.correction, exp<T>(m_old - base));
  T bases[W];
  S::store(bases, base);
  for (int i = 0; i < R; ++i) {
    T* const s = scores + i * kHeadLanesKeys;
    Vec<T> sum = S::zero();
    for (int64_t j = 0; j < kKeys; j += W) {
      const Vec<T> e = exp<T>(S::load(s + j) - S::set1(bases[i]));
      sum += e;
      S::store(s + j, e);
    }
    f.l[i] = S::fma(f.l[i], S::set1(f.correction[i]), sum);
  }
}

template <class T, int R, class Storage>
__attribute__((noinline)) void row_group_block(Storage storage, RowGroup<T>& f, const KeyBlock& block,
                                               RowsAhead& keys_ahead, RowsAhead& values_ahead,
                                               const HeadLanesScratch<T>& scratch) {
  const AttentionParams& p = f.head_rows->p;
  const int64_t k0 = block.first, n = block.n;
  uint64_t bits[kSharedRows<T>];
  const bool whole = f.all_see.begin <= k0 && k0 + n <= f.all_see.end;
  const Visibility seen = whole ? Visibility::kAll : visible_keys<T>(f, k0, n, bits);
  for (int i = 0; whole && i < R; ++i) bits[i] = bits_between(0, n);
  if (seen == Visibility::kNothing) return;
  T* const s = scratch.scores;
  constexpr bool scaled = std::is_same_v<Storage, Int8>;
  raw_scores<T, R>(storage, f, block, keys_ahead, s);
  if constexpr (scaled)
    scale_block<T>(f, p.k_scales, block.k_scales, n, s, [](Vec<T> score, Vec<T> scale) { return score * scale; });
  row_softmax<T, R, head_lanes_keys(Storage::size)>(f, k0, n, seen, bits, s);
  if (p.dropout_rate > 0) {  // after the sum: dropout acts on the normalised probabilities
    dropout_factors<T>(Dropout(p, f.head_rows->batch), f.position, f.head, f.rows, k0, n, scratch.factors);
    for (int i = 0; i < f.rows; ++i)
      for (int64_t j = 0; j < n; ++j) s[i * kHeadLanesKeys + j] *= scratch.factors[j * f.rows + i];
  }
  if constexpr (scaled) {  // a probability of 0 stays so, whatever the scale is: that of a hidden value may be NaN
    using S = Simd<T>;
    scale_block<T>(f, p.v_scales, block.v_scales, n, s, [](Vec<T> probability, Vec<T> scale) {
      return S::select(probability == S::zero(), S::zero(), probability * scale);
    });
  }
  if (seen == Visibility::kSome) add_values<T, R, true>(storage, f, block, values_ahead, s);
  else add_values<T, R, false>(storage, f, block, values_ahead, s);
}

// Writes out and the statistics, or m, l and the unnormalised o of a key split.
template <class T>
void finish_row_group(const RowGroup<T>& f, T* partial) {
  const AttentionParams& p = f.head_rows->p;
  for (int i = 0; i < f.rows; ++i) {
    const T l = f.total(i);
    const T* const out = f.out + i * round_to_width<T>(p.value_dim);
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

template <class T>
void forward_head_lanes(const AttentionParams& p, const HeadLanesTask& task, void* memory) {
  Arena arena(memory);
  const int64_t heads = task.head_end - task.head_begin, per_head = row_groups<T>(p);
  HeadLanesScratch<T>& scratch = HeadLanesScratch<T>::in(p, heads, &arena);
  for (int64_t h = 0; h < heads; ++h) {
    new (&scratch.heads[h]) HeadRows(p, task.batch, task.head_begin + h);
    for (int64_t g = 0; g < per_head; ++g) scratch.groups[h * per_head + g].start(scratch.heads[h], g * kSharedRows<T>);
  }
  const HeadRows& first = scratch.heads[0];
  KeyRange seen = first.keys_seen(0, first.count);
  if (seen.begin < task.key_begin) seen.begin = task.key_begin;
  if (seen.end > task.key_end) seen.end = task.key_end;

  const int64_t key_bytes = (p.head_dim + p.value_dim) * size_of(p.k.dtype);
  const int64_t block_bytes = head_lanes_keys(size_of(p.k.dtype)) * heads * key_bytes;
  const bool fits_l1 = block_bytes <= kL1Bytes / 2;
  with_read_storage(T{}, p.k.dtype, [&](auto storage) {
    // From a multiple of 4 on: key 4 n starts a group of random numbers.
    KeyBlock block(p, task.batch, seen.begin / 4 * 4, seen.end);
    while (block.n > 0) {
      const KeyBlock next(p, task.batch, block.first + block.n, seen.end);
      const auto ahead = [&](const StridedView& v, const char* at, int64_t dim) {
        return RowsAhead(v, at + task.head_begin * v.stride[2] * size_of(v.dtype), next.n, heads, dim, fits_l1);
      };
      RowsAhead keys_ahead = ahead(p.k, next.keys, p.head_dim), values_ahead = ahead(p.v, next.values, p.value_dim);
      for (int64_t g = 0; g < heads * per_head; ++g) {
        RowGroup<T>& f = scratch.groups[g];
        if (f.rows == 1) row_group_block<T, 1>(storage, f, block, keys_ahead, values_ahead, scratch);
        else if (f.rows == 2) row_group_block<T, 2>(storage, f, block, keys_ahead, values_ahead, scratch);
        else row_group_block<T, kSharedRows<T>>(storage, f, block, keys_ahead, values_ahead, scratch);
      }
      block = next;
    }
  });
  for (int64_t g = 0; g < heads * per_head; ++g) {
    char* const partial = static_cast<char*>(task.partials);
    finish_row_group<T>(scratch.groups[g],
                        reinterpret_cast<T*>(partial ? partial + g / per_head * task.head_bytes : nullptr));
  }
}

}  // namespace
}  // namespace attn_ops::cpu
