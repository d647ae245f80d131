// The two products of few rows, with vectors along the head dimension: scores of a block of keys, and sums over its values.
#pragma once

#include "row_group.h"
#include "rows_ahead.h"

namespace attn_ops::cpu {
namespace {

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
    Vec<T> acc[W];  // [row][key]
#pragma GCC unroll 4
    for (int t0 = 0; t0 < K; t0 += kAtOnce) {
      const char* key[kAtOnce];
      for (int t = 0; t < kAtOnce; ++t) key[t] = row + (t0 + t) * stride;
      if (j + K > n)  // what is past the keys is as the last of them
        for (int t = 0; t < kAtOnce; ++t)
          if (j + t0 + t >= n) key[t] = row + (n - 1 - j) * stride;
      ahead.ask(kAtOnce * ahead.row_bytes());
      for (int t = 0; t < kAtOnce; ++t) ahead.ask_with(key[t], ahead.row_bytes());
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

// f.scores[i][j] = times(f.scores[i][j], scale of key or value j) for the rows of a group and a block of n int8 keys or
// values, of whose scales kv head 0 has its first one at `first`. The scores of int8 keys are made before they are
// multiplied, and so are the sums over int8 values: a row of the cache is never there as floats.
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

// add(acc) adds to acc[i][v], which is what out has of NV vectors from column d on, and with `corrects` times the corrections.
template <int R, int NV, class E, class Add>
ATTN_INLINE void with_sums(const RowGroup<E>& f, int64_t d, bool corrects, const Add& add) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  T* const out = f.out + d;
  const int64_t size = round_to_width<T>(f.head_rows->p.value_dim);
  Vec<T> acc[R][NV];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < NV; ++v) {
      acc[i][v] = S::load(out + i * size + v * S::width);
      if (corrects) acc[i][v] *= S::set1(f.correction[i]);
    }
  add(acc);
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < NV; ++v) S::store(out + i * size + v * S::width, acc[i][v]);
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
  const int64_t n = block.n, stride = p.v.stride[1] * Storage::size;
  const char* const first = block.values + f.head_rows->kv_head * p.v.stride[2] * Storage::size;
  for (int64_t j0 = 0; j0 < n; j0 += kKeys) {
    const int64_t keys = n - j0 < kKeys ? n - j0 : kKeys;
    const char* const values = first + j0 * stride;
    const auto panel = [&](int64_t d, auto vectors, const auto& load) {
      constexpr int NV = decltype(vectors)::value;
      const char* at = values + d * Storage::size;
      with_sums<R, NV>(f, d, j0 == 0, [&](Vec<T>(&acc)[R][NV]) {
        for (int64_t j = 0; j < keys; ++j, at += stride) {
          if (j % kAsked == 0) ahead.ask((keys - j < kAsked ? keys - j : kAsked) * NV * W * Storage::size);
          ahead.ask_with(at, NV * W * Storage::size);
          Vec<T> x[NV];
          load(at, x);
#pragma GCC unroll 4
          for (int i = 0; i < R; ++i) {
            const T weight = f.scores[i * kHeadLanesKeys + j0 + j];
            if (hides && weight == 0) continue;
            for (int v = 0; v < NV; ++v) acc[i][v] = S::fma(S::set1(weight), x[v], acc[i][v]);
          }
        }
      });
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
  const int64_t n = block.n, stride = p.v.stride[1] * BFloat16::size;
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
    const char* at = first + d * BFloat16::size;
    with_sums<R, 2 * NP>(f, d, true, [&](Vec<T>(&acc)[R][2 * NP]) {
      for (int64_t j = 0; j < n; j += 2, at += 2 * stride) {
        const bool both = j + 1 < n;
        ahead.ask((both ? 2 : 1) * 2 * NP * W * BFloat16::size);
        ahead.ask_with(at, 2 * NP * W * BFloat16::size);
        if (both) ahead.ask_with(at + stride, 2 * NP * W * BFloat16::size);
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
    });
  };
  int64_t d = 0;
  for (; d + 4 * W <= p.value_dim; d += 4 * W) panel(d, Vectors<2>{});
  for (; d + 2 * W <= p.value_dim; d += 2 * W) panel(d, Vectors<1>{});
  return d;
}

}  // namespace
}  // namespace attn_ops::cpu
