// Forward for few rows, a decode step above all: the head dimension in the lanes, keys and values read as they lie.
//
// A row tile (row_lanes.h) would have most of its lanes empty. Here, for up to 4 rows i and a block of keys j,
//   s[i][j] = sum_d q'[i][d] k[j][d]                 vectors along d, `width` sums at a time reduced by a transposition
//   m' = max(m, max_j s),  p = e^(s - m')            vectors along the keys
//   o[i][d] = e^(m - m') o + sum_j p[i][j] v[j][d]   vectors along d
// Memory is the limit, so a task takes a block of keys for all its heads before the next block, and asks for the next
// block in the order it lies in memory: DRAM and TLB see one long read, whatever the layout; or row by row with those of
// this block, see walks_ahead(). Half precision is widened in registers, and half as many bytes are read. Each of the three steps
// is done for all heads before the next one: a row's way from its scores to its sums is a chain of some 400 cycles, and of
// one head alone nothing would run beside it.
// Of pairs (simd.h) scores and, where all rows see a block, values are sums of products of pairs, with weights in bfloat16.
#pragma once

#include "row_products.h"

namespace attn_ops::cpu {
namespace {

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

// The keys of a part of the work that its rows see.
inline KeyRange keys_of(const AttentionParams& p, const HeadLanesPart& part) {
  if (part.head_begin == part.head_end) return {0, 0};
  const HeadRows first(p, part.batch, part.head_begin);
  KeyRange seen = first.keys_seen(0, first.count);
  if (seen.begin < part.key_begin) seen.begin = part.key_begin;
  if (seen.end > part.key_end) seen.end = part.key_end;
  return seen;
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
  const bool walks = fits_l1 || walks_ahead();
  const auto run = [&](auto storage) {
    const KeyBlock next_first(p, task.next.batch, seen_next.begin, seen_next.end, scratch.keys);
    KeyBlock block(p, task.batch, seen.begin, seen.end, scratch.keys);
    while (block.n > 0) {
      const KeyBlock next(p, task.batch, block.first + block.n, seen.end, scratch.keys);
      const HeadLanesPart& of = next.n > 0 ? task : task.next;
      const KeyBlock& wanted = next.n > 0 ? next : next_first;
      const auto ahead = [&](const StridedView& v, const char* now, const char* at, int64_t dim) {
        const int64_t head_bytes = v.stride[2] * size_of(v.dtype);
        if (walks)
          return RowsAhead(v, at + of.head_begin * head_bytes, wanted.n, of.head_end - of.head_begin, dim, fits_l1);
        return RowsAhead(v, dim, wanted.n > 0 ? at - now + (of.head_begin - task.head_begin) * head_bytes : 0);
      };
      RowsAhead keys_ahead = ahead(p.k, block.keys, wanted.keys, p.head_dim),
                values_ahead = ahead(p.v, block.values, wanted.values, p.value_dim);
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
