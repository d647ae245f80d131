// The gradients of what scores.h adds to scores, or does to them: by the way, from the ds of a block.
//
//   s = cap tanh(s' / cap)                ds' = ds (1 - tanh^2)
//   s += bias                             d_bias = ds, summed where scores share an element: bias_gradient.h
//   s += relative_bias(distance)          d_relative_bias(distance) = sum of ds along the diagonal
//   a sink has p = e^(sink - m) / l and no value:  d_sink = sum_i p (0 - delta)
//
// A task sums its rows in double, and the sums of the tasks are added up in their order: no bit depends on the threads.
#pragma once

#include "backward_tile.h"

namespace attn_ops::cpu {
namespace {

// ds *= the derivative of the cap. A hidden score's may be NaN.
template <class T, int NV>
ATTN_INLINE void through_cap(const T* cap_slopes, int64_t keys, T* ds, int64_t ld) {
  using S = Simd<T>;
  constexpr int W = S::width;
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < NV; ++v) {
      T* const at = ds + j * ld + v * W;
      const Vec<T> x = S::load(at);
      S::store(at, S::select(x == S::zero(), x, x * S::load(cap_slopes + (j * NV + v) * W)));
    }
}

// table[head - first_head][distance] += ds
template <class T, int NV>
__attribute__((noinline)) void add_relative_gradient(const HeadRows& r, const RowTile<T>& tile, int64_t k0,
                                                     int64_t keys, const T* ds, int64_t ld, double* table) {
  using S = Simd<T>;
  constexpr int W = S::width;
  const AttentionParams& p = r.p;
  if (r.group == 1) {
    const Diagonals<T> diagonals(r, tile, k0, keys);
    T sum[Diagonals<T>::kMost] = {};
    for (int64_t j = 0; j < keys; ++j) {
      for (int v = 0; v < NV; ++v) {
        T* const at = sum + keys - 1 - j + v * W;
        S::store(at, S::load(at) + S::load(ds + j * ld + v * W));
      }
      // The vectors of one key overlap those of the next, which GCC 12 does not see: it keeps some in registers.
      asm volatile("" : : "r"(sum) : "memory");
    }
    for (int64_t i = 0; i < diagonals.count; ++i) table[relative_index(p, diagonals.distance(i))] += sum[i];
    return;
  }
  for (int i = 0; i < tile.rows; ++i) {
    double* const row = table + (tile.head[i] - r.first_head) * (2 * p.relative_reach + 1);
    const int64_t first = k0 - r.own(tile.position[i]);
    for (int64_t j = 0; j < keys; ++j) row[relative_index(p, first + j)] += ds[j * ld + i];
  }
}

// sinks[head - first_head] += the gradient of the sink by the rows of a tile. A row that the sink has alone weighs no value,
// whatever is in d_out there.
template <class E>
void add_sink_gradient(const BackwardParams& params, const HeadRows& r, const BackwardTile<E>& tile, double* sinks) {
  using T = Accumulator<E>;
  const T* const d_lse = static_cast<const T*>(params.d_lse);
  for (int i = 0; i < tile.rows; ++i) {
    const double sink = static_cast<double>(static_cast<const T*>(r.p.sinks)[tile.head[i]]);
    if (tile.inverse_l[i] == 0 || !(sink > -kInfinity<double>)) continue;
    const double weight = exp_of(sink - static_cast<double>(tile.m[i])) * static_cast<double>(tile.inverse_l[i]);
    double delta = static_cast<double>(tile.delta[i]);
    if (weight == 1 && !(delta - delta == 0))
      delta = d_lse ? -static_cast<double>(d_lse[r.statistic(tile.position[i], tile.head[i])]) : 0.0;
    sinks[tile.head[i] - r.first_head] -= weight * delta;
  }
}

}  // namespace
}  // namespace attn_ops::cpu
