// All that happens to a raw score before the softmax, in one order for every kernel:
//
//   s = scale q k^T        s += bias        hidden: -inf
//
// Forward and backward both finish their scores here, so backward's weights are forward's, bit for bit.
#pragma once

#include "visibility.h"

namespace attn_ops {
namespace cpu {
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
  const int64_t stride = bias.stride[3] * static_cast<int64_t>(size_of(bias.dtype));
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

// scores[j * ld + lane] of a tile, whose scaled queries are q [head_dim][ldq], against keys k0 .. k0 + n. see(v, scores)
// is told every vector. Nothing is written where the tile sees nothing; kSome also where there is a bias, which can
// hide: only after kAll may a loop do without looking for -inf.
template <class T, int NV, class See>
ATTN_INLINE Seen score_block(const HeadRows& r, const RowTile<T>& tile, const T* q, int64_t ldq, const KeyBlock<T>& keys,
                             int64_t k0, int64_t n, uint64_t* visible, T* scores, int64_t ld, const See& see) {
  using S = Simd<T>;
  constexpr int W = S::width;
  const bool bias = r.p.bias.data;
  const Seen seen = visible_keys<T>(r, tile, k0, n, visible);
  if (seen == Seen::kNothing) return seen;
  if (seen == Seen::kAll && !bias) {
    gemm<T, NV, Major::kRow>(n, keys.at(k0), keys.ld(), q, ldq, r.p.head_dim, [=, &see](int64_t j, int v, Vec<T> x) {
      S::store(scores + j * ld + v * W, x);
      see(v, x);
    });
    return seen;
  }
  gemm<T, NV, Major::kRow>(n, keys.at(k0), keys.ld(), q, ldq, r.p.head_dim,
                           [=](int64_t j, int v, Vec<T> x) { S::store(scores + j * ld + v * W, x); });
  if (bias) add_bias<T>(r, tile, k0, n, scores, ld);
  hide_scores<T, NV>(tile, seen == Seen::kSome ? visible : nullptr, n, scores, ld, see);
  return Seen::kSome;
}

}  // namespace
}  // namespace cpu
}  // namespace attn_ops
