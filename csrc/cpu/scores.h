// All that happens to a raw score before the softmax, in one order for every kernel:
//
//   s = scale q k^T        s += bias        hidden: -inf
//
// score_block does it for tiles, with a query row in each lane: forward and backward alike, so backward's weights are
// forward's, bit for bit. finish_row_scores does it for one row with the keys in the lanes (head_lanes.h).
#pragma once

#include "key_rows.h"
#include "visibility.h"

namespace attn_ops::cpu {
namespace {

// s + bias. A bias of -inf hides, whatever the score is. A sum of finite numbers stays finite: past the end of the
// range -inf would hide a key that is not hidden, and inf would make the row NaN.
template <class T>
ATTN_INLINE Vec<T> biased(Vec<T> s, Vec<T> bias) {
  using S = Simd<T>;
  const Vec<T> largest = S::set1(kLargest<T>), hidden = S::set1(-kInfinity<T>);
  const Vec<T> sum = s + bias, finite = S::fma(s, S::zero(), bias * S::zero());  // 0, or NaN
  const Vec<T> inside = S::max(-largest, S::min(largest, sum));
  return S::select(bias == hidden, hidden, S::select(finite == S::zero(), inside, sum));
}

// The scores whose bit is set, and -inf in the other lanes.
template <class T>
ATTN_INLINE Vec<T> seen_or_hidden(uint64_t bits, Vec<T> s) {
  using S = Simd<T>;
  using I = typename S::I;
  using Bits = decltype(I{}[0] + 0);
  I lane_bit;
  for (int i = 0; i < S::width; ++i) lane_bit[i] = Bits{1} << i;
  const I all = I{} + static_cast<Bits>(bits & ((uint64_t{1} << S::width) - 1));
  return S::select((all & lane_bit) != 0, s, S::set1(-kInfinity<T>));
}

// What the scores of a row are compared with. A row that has seen nothing yet has the maximum -inf; -inf - (-inf) would
// be NaN, so it is compared with 0 instead.
template <class T>
ATTN_INLINE Vec<T> softmax_base(Vec<T> m) {
  return Simd<T>::select(m == Simd<T>::set1(-kInfinity<T>), Simd<T>::zero(), m);
}

// scores[j * ld + lane] += bias, as `biased` does.
template <class T>
__attribute__((noinline)) void add_bias(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys, T* scores,
                                        int64_t ld) {
  using S = Simd<T>;
  const StridedView& bias = r.p.bias;
  const int64_t stride = bias.step();
  const auto add = [](T* at, Vec<T> x) { S::store(at, biased<T>(S::load(at), x)); };
  const auto row_of = [&](int lane) { return r.score_row(bias, tile.position[lane], tile.head[lane]) + k0 * stride; };
  if (same_for_all_rows(r, tile, bias)) {
    T column[kBlockKeys];
    load_row<T>(bias.dtype, row_of(0), stride, keys, false, column);
    for (int64_t j = 0; j < keys; ++j)
      for (int i = 0; i < tile.lanes; i += S::width) add(scores + j * ld + i, S::set1(column[j]));
    return;
  }
  const char* row[RowTile<T>::max_lanes];
  for (int i = 0; i < tile.rows; ++i) {
    row[i] = row_of(i);
    const char* const next_block = row[i] + keys * stride;
    for (int64_t b = 0; b < keys * stride; b += 64) __builtin_prefetch(next_block + b);
  }
  load_transposed<T>(bias.dtype, row, tile.rows, tile.lanes, stride, keys, scores, ld, add);
}

// scores[j * ld + lane] = -inf where the lane does not see key j; `visible` null: all do. see(v, score) is told the
// result.
template <class T, int NV, class See>
ATTN_INLINE void hide_scores(const RowTile<T>& tile, const uint64_t* visible, int64_t keys, T* scores, int64_t ld,
                             const See& see) {
  using S = Simd<T>;
  constexpr int W = S::width;
  const uint64_t used = bits_between(0, tile.rows);
  for (int64_t j = 0; j < keys; ++j) {
    T* const at = scores + j * ld;
    if (!visible || (visible[j] & used) == used) {
      for (int v = 0; v < NV; ++v) see(v, S::load(at + v * W));
      continue;
    }
    for (int v = 0; v < NV; ++v) {
      const Vec<T> s = seen_or_hidden<T>(visible[j] >> (v * W), S::load(at + v * W));
      S::store(at + v * W, s);
      see(v, s);
    }
  }
}

// scores[j * ld + lane] of a tile, whose scaled queries are q [head_dim][ldq], against keys k0 .. k0 + n. see(v,
// scores) is told every vector. Nothing is written where the tile sees nothing; kSome also where there is a bias, which
// can hide: only after kAll may a loop do without looking for -inf.
template <class T, int NV, class See>
ATTN_INLINE Visibility score_block(const HeadRows& r, const RowTile<T>& tile, const T* q, int64_t ldq,
                                   const KeyRows<T>& keys, int64_t k0, int64_t n, uint64_t* visible, T* scores,
                                   int64_t ld, const See& see) {
  using S = Simd<T>;
  constexpr int W = S::width;
  const bool bias = r.p.bias.data;
  const Visibility seen = visible_keys<T>(r, tile, k0, n, visible);
  if (seen == Visibility::kNothing) return seen;
  if (seen == Visibility::kAll && !bias) {
    gemm<T, NV, Major::kRow>(n, keys.at(k0), keys.ld(), q, ldq, r.p.head_dim, [=, &see](int64_t j, int v, Vec<T> x) {
      S::store(scores + j * ld + v * W, x);
      see(v, x);
    });
    return seen;
  }
  gemm<T, NV, Major::kRow>(n, keys.at(k0), keys.ld(), q, ldq, r.p.head_dim,
                           [=](int64_t j, int v, Vec<T> x) { S::store(scores + j * ld + v * W, x); });
  if (bias) add_bias<T>(r, tile, k0, n, scores, ld);
  hide_scores<T, NV>(tile, seen == Visibility::kSome ? visible : nullptr, n, scores, ld, see);
  return Visibility::kSome;
}

// scores[0 .. n) of one query row against keys k0 .. k0 + n, whose bits tell which it sees: the same, with -inf to the
// end of the last vector.
template <class T>
__attribute__((noinline)) void finish_row_scores(const HeadRows& r, int64_t position, int64_t head, int64_t k0,
                                                 int64_t n, uint64_t bits, T* scores) {
  using S = Simd<T>;
  const StridedView& bias = r.p.bias;
  T added[kHeadLanesKeys];
  if (bias.data) {
    const int64_t stride = bias.step();
    load_row<T>(bias.dtype, r.score_row(bias, position, head) + k0 * stride, stride, n, true, added);
  }
  for (int64_t j = 0; j < n; j += S::width) {
    Vec<T> s = S::load(scores + j);
    if (bias.data) s = biased<T>(s, S::load(added + j));
    S::store(scores + j, seen_or_hidden<T>(bits >> j, s));
  }
}

}  // namespace
}  // namespace attn_ops::cpu
