// d_bias = ds, summed over the axes along which the bias was broadcast: in the main pass of backward, block by block.
//
// Where no two scores share an element (kOwn), ds is written where it belongs. Else tasks add up the ds of their rows,
// head after head; which heads, and in which order, goes by shape alone (HeadUnits in schedule.h), and so no bit
// depends on the threads. The rows are those of one query head at a time, however many share a kv head
// (separate_heads).
//
// A bias of one element has as many terms as there are scores: one chain of float32 was off by 840 of its last digits.
// So all sums are doubles, but those of elements, which memory would feel: they join doubles once for every kSumTerms
// heads. Where one task adds up all there is for an element, its sums are d_bias itself.
#pragma once

#include "kernels.h"
#include "row_tile.h"

namespace attn_ops::cpu {
namespace {

inline char* bias_gradient_row(const BackwardParams& params, const HeadRows& r, int64_t position, int64_t head) {
  const AttentionParams& p = params.forward;
  return static_cast<char*>(params.d_bias) + r.statistic(position, head) * p.seqlen_k * size_of(p.bias.dtype);
}

// kOwn: d_bias = ds of a block.
template <class T>
__attribute__((noinline)) void write_bias_gradient(const BackwardParams& params, const HeadRows& r,
                                                   const RowTile<T>& tile, int64_t k0, int64_t keys, const T* ds,
                                                   int64_t ld) {
  const DType dtype = params.forward.bias.dtype;
  char* row[RowTile<T>::max_lanes];
  for (int i = 0; i < tile.rows; ++i)
    row[i] = bias_gradient_row(params, r, tile.position[i], tile.head[i]) + k0 * size_of(dtype);
  store_transposed<T>(dtype, row, tile.rows, tile.lanes, size_of(dtype), keys, ds, ld,
                      [](const T* at, int) { return Simd<T>::load(at); });
}

// The keys of which some block is computed for these tiles, which meet all blocks together.
template <class Tile>
KeyRange keys_met(const Tile* t0, const Tile* t1) {
  KeyRange met{0, 0};
  for (const Tile* t = t0; t < t1; ++t) {
    if (t->begin >= t->end) continue;
    if (met.end == 0 || t->begin < met.begin) met.begin = t->begin;
    if (t->end > met.end) met.end = t->end;
  }
  return met;
}

// kOwn: d_bias = 0 for all other keys.
template <class T>
void clear_bias_gradient(const BackwardParams& params, const HeadRows& r, const RowTile<T>& tile, const KeyRange& met) {
  const int64_t size = size_of(params.forward.bias.dtype), keys = params.forward.seqlen_k;
  for (int i = 0; i < tile.rows; ++i) {
    char* const row = bias_gradient_row(params, r, tile.position[i], tile.head[i]);
    memset(row, 0, met.begin * size);
    memset(row + met.end * size, 0, (keys - met.end) * size);
  }
}

// kElements: the row of a tile's lane in the sums, and the same there.
template <class T>
ATTN_INLINE T* sum_row(const BiasSums& to, const RowTile<T>& tile, int lane, int64_t seqlen_k) {
  return static_cast<T*>(to.sums) + (tile.first + lane) * seqlen_k;
}
template <class T>
void clear_sums(const BiasSums& to, const RowTile<T>& tile, int64_t seqlen_k, const KeyRange& met) {
  for (int i = 0; i < tile.rows; ++i) {
    T* const row = sum_row<T>(to, tile, i, seqlen_k);
    memset(row, 0, sizeof(T) * met.begin);
    memset(row + met.end, 0, sizeof(T) * (seqlen_k - met.end));
  }
}

// kElements: sums += ds of a block, or = where it is the first.
template <class T>
__attribute__((noinline)) void add_elements(const BiasSums& to, const RowTile<T>& tile, int64_t k0, int64_t keys,
                                            int64_t seqlen_k, const T* ds, int64_t ld) {
  using S = Simd<T>;
  constexpr int W = S::width;
  for (int r0 = 0; r0 < tile.rows; r0 += W)
    for (int64_t j0 = 0; j0 < keys; j0 += W) {
      const int64_t n = keys - j0 < W ? keys - j0 : W;
      Vec<T> block[W];
      for (int64_t j = 0; j < W; ++j) block[j] = j < n ? S::load(ds + (j0 + j) * ld + r0) : S::zero();
      S::transpose(block);
      for (int i = 0; i < W && r0 + i < tile.rows; ++i) {
        T* const at = sum_row<T>(to, tile, r0 + i, seqlen_k) + k0 + j0;
        if (n == W) S::store(at, to.starts ? block[i] : S::load(at) + block[i]);
        else S::store(at, to.starts ? block[i] : S::load(at, n) + block[i], n);
      }
    }
}

// kColumns, kRows, kAll: sums += those of a block.
template <class T, int NV>
__attribute__((noinline)) void add_block_sums(BiasGradient kind, double* sums, const RowTile<T>& tile, int64_t k0,
                                              int64_t keys, const T* ds, int64_t ld) {
  using S = Simd<T>;
  constexpr int W = S::width, lanes = NV * W;
  if (kind == BiasGradient::kColumns) {
    for (int64_t j = 0; j < keys; j += W) {
      Vec<T> of_key[W];
      for (int i = 0; i < W; ++i) {
        of_key[i] = S::zero();
        for (int v = 0; v < NV && j + i < keys; ++v) of_key[i] += S::load(ds + (j + i) * ld + v * W);
      }
      S::transpose(of_key);
      for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) of_key[i] += of_key[i + half];
      for (int i = 0; i < W && j + i < keys; ++i) sums[k0 + j + i] += static_cast<double>(of_key[0][i]);
    }
    return;
  }
  double row[lanes] = {};
  for (int64_t j = 0; j < keys; ++j, ds += ld)
    for (int i = 0; i < lanes; ++i) row[i] += static_cast<double>(ds[i]);
  for (int i = 0; i < lanes; ++i) sums[kind == BiasGradient::kRows ? tile.first + i : 0] += row[i];
}

// Before the rows first .. last of a query head, and after them.
inline void start_sums(BiasGradient kind, const BiasSums& to, int64_t first, int64_t last, int64_t seqlen_k) {
  if (!to.starts || kind == BiasGradient::kElements) return;
  double* const sums = static_cast<double*>(to.sums);
  if (kind == BiasGradient::kRows) memset(sums + first, 0, sizeof(double) * (last - first));
  else memset(sums, 0, sizeof(double) * (kind == BiasGradient::kColumns ? seqlen_k : 1));
}
template <class T>
void finish_sums(const BiasSums& to, int64_t first, int64_t last, int64_t rows, int64_t seqlen_k) {
  if (!to.adds) return;
  last = last < rows ? last : rows;
  const T* const sums = static_cast<const T*>(to.sums);
  for (int64_t i = first * seqlen_k; i < last * seqlen_k; ++i)
    to.totals[i] = (to.begins ? 0.0 : to.totals[i]) + static_cast<double>(sums[i]);
}

constexpr int64_t kSumsAtOnce = 1024;

// to[0 .. count) = the sum of `copies`.
template <class T, class From>
void add_copies(const From* from, int64_t copies, int64_t stride, int64_t count, double* sum, T* to) {
  for (int64_t i = 0; i < count; ++i) sum[i] = static_cast<double>(from[i]);
  for (int64_t c = 1; c < copies; ++c)
    for (int64_t i = 0; i < count; ++i) sum[i] += static_cast<double>(from[c * stride + i]);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(sum[i]);
}

template <class T>
void bias_gradient(const BackwardParams& params, const BiasGradientTask& task, void* memory) {
  const int64_t* const shape = params.d_bias_shape;
  const DType dtype = params.forward.bias.dtype;
  const int64_t size = size_of(dtype);
  char* const base =
      static_cast<char*>(params.d_bias) + (task.batch * shape[1] + task.head) * shape[2] * shape[3] * size;
  Arena arena(memory);
  double* const sum = arena.take<double>(kSumsAtOnce);
  T* const total = arena.take<T>(kSumsAtOnce);
  const bool wide = task.totals || bias_gradient_of(params) != BiasGradient::kElements;
  const void* const from = task.totals ? task.totals : task.sums;
  for (int64_t at = task.begin; at < task.end; at += kSumsAtOnce) {
    const int64_t n = task.end - at < kSumsAtOnce ? task.end - at : kSumsAtOnce;
    if (wide) add_copies(static_cast<const double*>(from) + at, task.copies, task.stride, n, sum, total);
    else add_copies(static_cast<const T*>(from) + at, task.copies, task.stride, n, sum, total);
    store_row<T>(dtype, base + at * size, size, n, total, T{1});
  }
}

template <class T>
int64_t bias_gradient_scratch() {
  return Arena::bytes<double>(kSumsAtOnce) + Arena::bytes<T>(kSumsAtOnce);
}

}  // namespace
}  // namespace attn_ops::cpu
