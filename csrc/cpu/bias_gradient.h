// d_bias = ds, summed over the axes along which the bias was broadcast. (Where it was not, backward writes it by the way:
// term_gradients.h.)
//
// A pass of its own, so that every element of the gradient is summed by one task in a fixed order: a task owns rows
// of the bias and recomputes ds for every (batch, head) that used them. It costs two products (s, dp) on top of
// backward's five, and only when the gradient of a bias is asked for.
//
// A bias of one element has as many terms as there are scores. In one chain of additions the rounding errors of equal
// terms all have one sign, so the chain carries the digits that it drops.
#pragma once

#include "backward.h"

namespace attn_ops::cpu {
namespace {

// sum + low += x, of which low is what sum cannot hold (Knuth's TwoSum); for numbers and vectors.
template <class V>
ATTN_INLINE void add_with_low(V x, V* sum, V* low) {
  const V total = *sum + x, added = total - *sum;
  *low = *low + ((*sum - (total - added)) + (x - added));
  *sum = total;
}

template <class T>
ATTN_INLINE T sum_and_low(T sum, T low) {
  return low == low ? sum + low : sum;  // where the sum is no longer finite, low is NaN
}

template <class T>
int64_t bias_gradient_scratch_bytes(const BackwardParams& params) {
  return BackwardScratch<T>::bytes(params.forward) +
         Arena::bytes<T>(2 * RowTile<T>::max_lanes * (params.d_bias_shape[3] ? params.d_bias_shape[3] : 1));
}

// sum[key or 0][lane] + low[key or 0][lane] += ds of one tile.
template <class T>
void add_score_gradients(const BackwardParams& params, const HeadRows& r, BackwardTile<T>& tile,
                         const BackwardScratch<T>& scratch, Arena arena, T* sum, T* low) {
  using S = Simd<T>;
  const AttentionParams& p = params.forward;
  constexpr int64_t ld = RowTile<T>::max_lanes;
  const int64_t key_ld = params.d_bias_shape[3] == 1 ? 0 : ld;
  start_tile<T>(params, r, tile);
  KeyRows<T> keys(r, p.k, p.k_scales, p.head_dim, false, &arena);
  KeyRows<T> values(r, p.v, p.v_scales, p.value_dim, false, &arena);
  if (recomputes_statistics<T>(p))
    recompute_statistics<T>(params, r, &tile, 1, tile.begin, tile.end, keys, values, scratch);
  for (int64_t k0 = tile.begin / 4 * 4; k0 < tile.end; k0 += kBlockKeys) {
    const int64_t k1 = k0 + kBlockKeys < tile.end ? k0 + kBlockKeys : tile.end;
    keys.load(k0, k1);
    values.load(k0, k1);
    with_vectors(tile.nv, [&](auto nv) {
      score_gradients<T, decltype(nv)::value>(r, tile, keys, values, k0, k1, scratch, scratch.p, scratch.ds,
                                              tile.lanes);
    });
    for (int64_t j = 0; j < k1 - k0; ++j)
      for (int i = 0; i < tile.lanes; i += S::width) {
        const int64_t at = (k0 + j) * key_ld + i;
        Vec<T> high = S::load(sum + at), rest = S::load(low + at);
        add_with_low(S::load(scratch.ds + j * tile.lanes + i), &high, &rest);
        S::store(sum + at, high);
        S::store(low + at, rest);
      }
  }
}

template <class T>
void bias_gradient(const BackwardParams& params, const BiasGradientTask& task, void* memory) {
  const AttentionParams& p = params.forward;
  const int64_t* const shape = params.d_bias_shape;
  const int64_t size = size_of(p.bias.dtype), keys = shape[3];
  constexpr int lanes = RowTile<T>::max_lanes;
  Arena arena(memory);
  BackwardScratch<T> scratch(p, arena);
  const int64_t sums = lanes * keys;
  T *const sum = arena.take<T>(2 * sums), *const low = sum + sums;
  char* const base =
      static_cast<char*>(params.d_bias) + (task.bias_batch * shape[1] + task.bias_head) * shape[2] * keys * size;
  const bool all_rows = shape[2] == 1;  // broadcast over rows: the lanes of all tiles are summed at the end
  const int64_t batch_end = shape[0] == 1 ? p.batch : task.bias_batch + 1;
  const int64_t head_end = shape[1] == 1 ? p.num_heads : task.bias_head + 1;

  memset(sum, 0, sizeof(T) * 2 * sums);
  for (int64_t t = task.tile_begin; t < task.tile_end; ++t) {
    BackwardTile<T>& tile = scratch.tiles[0];
    for (int64_t b = shape[0] == 1 ? 0 : task.bias_batch; b < batch_end; ++b)
      for (int64_t h = shape[1] == 1 ? 0 : task.bias_head; h < head_end; ++h) {
        const HeadRows r(p, b, h / group_size(p), h, 1);
        const Tiling<T> tiling(r.count);
        tile.setup(r, tiling, t);
        if (tile.begin < tile.end) add_score_gradients<T>(params, r, tile, scratch, arena, sum, low);
      }
    if (all_rows) continue;
    char* row[lanes];
    for (int i = 0; i < tile.rows; ++i) row[i] = base + (tile.first + i) * keys * size;
    for (int64_t i = 0; i < sums; ++i) sum[i] = sum_and_low(sum[i], low[i]);
    store_transposed<T>(p.bias.dtype, row, tile.rows, lanes, size, keys, sum, lanes,
                        [](const T* at, int) { return Simd<T>::load(at); });
    memset(sum, 0, sizeof(T) * 2 * sums);
  }
  if (!all_rows) return;
  for (int64_t j = 0; j < keys; ++j) {
    T total = 0, rest = 0;
    for (int64_t i = j * lanes; i < (j + 1) * lanes; ++i) {
      add_with_low(sum[i], &total, &rest);
      rest += low[i];
    }
    total = sum_and_low(total, rest);
    store_row<T>(p.bias.dtype, base + j * size, size, 1, &total, T{1});
  }
}

}  // namespace
}  // namespace attn_ops::cpu
