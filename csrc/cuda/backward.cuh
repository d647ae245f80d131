// Backward, what its kernels share:
//
//   s = scale q k^T, capped, + slope distance + bias    p = e^(s - m) / l    dp = d_out v^T
//   ds = p (dp - delta)       delta = rowsum(p * dp) - d_lse
//   dq = scale ds k           dk = scale ds^T q           dv = p^T d_out           d_bias = ds
//
// Scores are computed anew: once by the blocks that keep query rows and make dq (query_gradient.cuh), once by those
// that keep keys and make dk and dv (key_gradients.cuh). That is eight products where five would do, but no sum is
// shared between blocks: no atomics, no float32 copies of gradients, the same bits every time.
#pragma once

#include "dropout.cuh"
#include "finite.cuh"

namespace attn_ops::cuda {

template <class M, int kDim, bool kPlain, bool kQueriesStay>
struct BackwardShape {
  static constexpr Tile kTile = backward_tile(M::kMath, kDim, kPlain, kQueriesStay);
  static constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n, kThreads = kTile.threads();
  static constexpr bool kKeeps =
      keeps_operands(M::kMath, kDim, kPlain, kQueriesStay) && may_keep_operands<kDim>(kQueriesStay);
  // Where the host counts on operands that are kept, and they are not, there is room for one stage.
  static constexpr bool kReplaces = second_stage_replaces(M::kMath, kDim, kPlain, kQueriesStay);
  static constexpr int kStages = kReplaces && !kKeeps ? 1 : backward_stages(M::kMath, kDim, kTile);
  // What is taken of a tile that passes, at a time. Beside masks, two sums of 128 columns have registers for 16 keys.
  static constexpr bool kHasTwoSums = kQueriesStay && passes_once(M::kMath, kDim, kPlain);
  static constexpr int kUnkeptStep = kHasTwoSums && !kPlain && kDim == 128 ? 16 : kBlockN;
  static constexpr int kStep = kKeeps ? kept_step<kDim>(kQueriesStay) : kUnkeptStep;
  static constexpr int kMmaM = kBlockM / 16 / kTile.warps, kMmaN = kStep / 8;
};

// The two arrays of rows that stay, and the two of those that pass, for each stage; behind them what is told of query rows
// that pass, for each stage, what is made of it, and flags. Where the second stage replaces what stays, so does what is
// told of its rows.
template <class M, int kDim, bool kPlain, bool kQueriesStay>
struct BackwardTiles {
  using Shape = BackwardShape<M, kDim, kPlain, kQueriesStay>;
  using T = SharedTile<M, kDim>;
  static constexpr int kStationary = 2 * Shape::kBlockM, kStreamed = 2 * Shape::kBlockN;  // rows
  static constexpr int kToldBytes = kQueriesStay ? 0 : told_rows_bytes(Shape::kBlockN, kPlain);
  static constexpr int kFinishedBytes = kQueriesStay ? 0 : finished_rows_bytes(Shape::kBlockN);
  static_assert(!Shape::kReplaces || kStreamed * T::kRowBytes + kToldBytes <= kStationary * T::kRowBytes, "no place");

  ATTN_DEVICE T stationary(int which) const { return {shared_memory() + which * Shape::kBlockM * T::kRowBytes}; }
  ATTN_DEVICE T streamed(int which, int stage) const {
    const int rows = Shape::kReplaces ? (stage == 0 ? kStationary : 0) : kStationary + stage * kStreamed;
    return {shared_memory() + (rows + which * Shape::kBlockN) * T::kRowBytes};
  }
  ATTN_DEVICE char* told(int stage) const {
    if (Shape::kReplaces) return streamed(0, stage).data + kStreamed * T::kRowBytes;
    return streamed(0, Shape::kStages).data + stage * kToldBytes;
  }
  ATTN_DEVICE char* finished() const { return told(Shape::kReplaces ? 0 : Shape::kStages - 1) + kToldBytes; }
  ATTN_DEVICE Flags flags() const { return reinterpret_cast<Flags>(finished() + kFinishedBytes); }
};

// Rows of the two tiles that stay, from a warp's `first` on, as operands in its registers. The tiles are on their way; their
// places are the second stage's then.
template <class M, int kDim, int kMmaM>
ATTN_DEVICE void keep(LeftOperands<M, kDim, kMmaM>& a, const SharedTile<M, kDim>& tile_a, LeftOperands<M, kDim, kMmaM>& b,
                      const SharedTile<M, kDim>& tile_b, int first) {
  copy_async_wait<0>();
  sync_block();
  a.load(tile_a, first);
  b.load(tile_b, first);
  sync_block();
}

// Runs `compute(column, stage)` for columns begin, next_from(begin + kBlockN), ... below end, each after
// `load(column, stage)` has brought its tiles: while the ones before are computed with, where there is room for two
// stages. Between the two, before others see it, a thread may change what it has copied itself, and what all are done
// with: `arrive(column, stage)`. While nothing but the first tiles is on its way, `begun()`.
template <int kStages, int kBlockN, class Next, class Load, class Begun, class Arrive, class Compute>
ATTN_DEVICE void stream(int begin, int end, Next next_from, Load load, Begun begun, Arrive arrive, Compute compute) {
  int stage = 0;
  if (begin < end) load(begin, 0);
  copy_async_commit();
  begun();
#pragma unroll 1
  for (int column = begin, next; column < end; column = next) {
    next = next_from(column + kBlockN);
    if (kStages == 2) {
      if (next < end) load(next, stage ^ 1);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    arrive(column, stage);
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

// What makes probabilities of products q k^T in one instruction and an exponential, of a row that fits (fits_fused), and
// the row's delta. lse_2 is (maximum + log sum) log2(e).
struct FusedRow {
  float lse_2, delta;

  ATTN_DEVICE float probability(float x, float scale) const { return fused_weight(x, scale, lse_2); }
  ATTN_DEVICE float of_score(float p, float dp) const { return p * (dp - delta); }
};

// What forward left of a row, and the row's delta.
struct RowGradient {
  float maximum = 0.0f, inverse_sum = 0.0f, delta = 0.0f;

  ATTN_DEVICE RowGradient() {}
  ATTN_DEVICE RowGradient(float maximum, float inverse_sum, float delta)
      : maximum(maximum), inverse_sum(inverse_sum), delta(delta) {}
  ATTN_DEVICE RowGradient(const AttentionParams& p, int64_t row, float delta) : delta(delta) {
    const float* statistics = static_cast<const float*>(p.statistics) + 2 * row;
    maximum = statistics[0];
    inverse_sum = inverse(statistics[1]);
  }
  ATTN_DEVICE static float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

  ATTN_DEVICE bool fits() const { return fits_fused(maximum); }
  ATTN_DEVICE static float lse_2(float maximum, float inverse_sum) { return maximum * kLog2E - log2_fast(inverse_sum); }
  ATTN_DEVICE FusedRow fused() const { return {lse_2(maximum, inverse_sum), delta}; }

  // Of the sink of a head, if there is one (join_sink).
  ATTN_DEVICE float weight_of_sink(const AttentionParams& p, int head) const {
    const float sink = p.sinks == nullptr ? minus_infinity() : static_cast<const float*>(p.sinks)[head];
    return sink > minus_infinity() ? exponential(sink - maximum) * inverse_sum : 0.0f;
  }
  // Of a product; of a score.
  ATTN_DEVICE float probability(float x, float scale) const { return probability(product(x, scale)); }
  ATTN_DEVICE float probability(float x) const { return recomputed_probability(x, maximum, inverse_sum); }
  // The same of what finish_scores gives.
  ATTN_DEVICE float probability_or_hidden(float x) const {
    return is_minus_infinity(x) ? float_of(kHiddenBits) : probability(x);
  }
  ATTN_DEVICE float of_score(float p, float dp) const { return p * (dp - delta); }
};

}  // namespace attn_ops::cuda
