// Backward, what its kernels share:
//
//   s = scale q k^T + bias    p = e^(s - lse)    dp = d_out v^T    ds = p (dp - delta)    delta = rowsum(d_out * out) - d_lse
//   dq = scale ds k           dk = scale ds^T q           dv = p^T d_out           d_bias = ds
//
// Scores are computed anew: once by the blocks that keep query rows and make dq (query_gradient.cuh), once by those
// that keep keys and make dk and dv (key_gradients.cuh). That is seven products where five would do, but no sum is
// shared between blocks: no atomics, no float32 copies of gradients, the same bits every time.
#pragma once

#include "dropout.cuh"
#include "finite.cuh"

namespace attn_ops {
namespace cuda {

template <class M, int kDim, bool kPlain>
struct BackwardShape {
  static constexpr Tile kTile = backward_tile(M::kMath, kDim, kPlain);
  static constexpr int kRows = kTile.rows, kColumns = kTile.columns, kThreads = kTile.threads();
  static constexpr int kStages = backward_stages(M::kMath, kDim, kPlain);
  static constexpr int kM = kRows / 16 / kTile.warps, kN = kColumns / 8;
};

// The two arrays of rows that stay, and the two of those that pass, for each stage.
template <class M, int kDim, bool kPlain>
struct BackwardTiles {
  using Shape = BackwardShape<M, kDim, kPlain>;
  using T = SharedTile<M, kDim>;

  ATTN_DEVICE T staying(int which) const { return {shared_memory() + which * Shape::kRows * T::kRowBytes}; }
  ATTN_DEVICE T passing(int which, int stage) const {
    return {shared_memory() + (2 * Shape::kRows + (2 * stage + which) * Shape::kColumns) * T::kRowBytes};
  }
  // kBackwardStatisticsBytes
  ATTN_DEVICE char* rest() const { return passing(0, Shape::kStages).data; }
  ATTN_DEVICE Flags flags() const { return reinterpret_cast<Flags>(rest() + 2 * 64 * 16); }
};

// Runs `compute(column, stage)` for columns begin, begin + kColumns, ... below end, each after `load(column, stage)`
// has brought its tiles: while the ones before are computed with, where there is room for two stages.
template <int kStages, int kColumns, class Load, class Compute>
ATTN_DEVICE void stream(int begin, int end, Load load, Compute compute) {
  int stage = 0;
  if (begin < end) load(begin, 0);
  copy_async_commit();
#pragma unroll 1
  for (int column = begin; column < end; column += kColumns) {
    const int next = column + kColumns;
    if (kStages == 2) {
      if (next < end) load(next, stage ^ 1);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();
    compute(column, stage);
    sync_block();
    if (kStages == 2) {
      stage ^= 1;
    } else {
      if (next < end) load(next, 0);
      copy_async_commit();
    }
  }
  copy_async_wait<0>();
}

// From what finish_scores gives for one pair of query and key.
struct PairGradient {
  float p, ds;

  ATTN_DEVICE PairGradient(float x, float lse, float dp, float delta) {
    p = bits_of(x) == 0xff800000u ? float_of(kHiddenBits) : recomputed_probability(x, lse);
    ds = is_hidden(p) ? p : p * (dp - delta);
  }
};

}  // namespace cuda
}  // namespace attn_ops
