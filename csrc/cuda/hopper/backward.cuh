// Backward on Hopper, of the plain calls in 16 bits, what its two kernels share. As in ../backward.cuh, one makes dq (and
// delta), one dk and dv:
//
//   s = scale q k^T    p = e^(s - m) / l    dp = d_out v^T    ds = p (dp - delta)
//
// What stays in a block are two tiles of 128 rows, 64 for each of the two warpgroups that compute; what passes comes by
// the copy engine, two tiles of 64 or 96 rows at a time. While one warpgroup is at its probabilities, the products of the
// other run.
#pragma once

#include "../backward.cuh"
#include "finite.cuh"

namespace attn_ops::cuda::hopper {

template <int kDim>
constexpr int kPassing = backward_shape(kDim, true).block_n;  // rows of a tile that passes

// What is known of the query rows of one.
template <int kRows>
struct alignas(16) StreamedRows {
  float lse_2[kRows], delta[kRows];  // (maximum + log sum) log2(e)
  float maximum[kRows], inverse_sum[kRows];
  Interval seen[kRows];
  uint32_t exact;  // whether some maximum is beyond kFusedLimit

  // Of columns 8 n + 2 t and the next, which are a lane's.
  struct alignas(8) Pair {
    float of[2];
  };
  ATTN_DEVICE static Pair pair(const float (&values)[kRows], int n, int t) {
    return *reinterpret_cast<const Pair*>(values + 8 * n + 2 * t);
  }
};

// A probability from scores q k^T, as ../backward.cuh has it: a score of -inf hides, whatever the row's maximum is.
ATTN_DEVICE float exact_probability(float x, float scale, float maximum, float inverse_sum) {
  const float score = product(x, scale);
  return is_minus_infinity(score) ? float_of(kHiddenBits) : recomputed_probability(score, maximum, inverse_sum);
}

template <int kDim>
struct BackwardMemory {
  static constexpr Shape kShape = backward_shape(kDim, true);
  static constexpr int kStages = kShape.stages, kConsumers = kShape.consumers;
  using Staying = PanelTile<kWarpgroupRows, kDim>;
  using Passing = PanelTile<kShape.block_n, kDim>;
  using Rows = StreamedRows<kShape.block_n>;

  char* base = panel_memory();

  ATTN_DEVICE Staying stationary(int which, int consumer) const {
    return {base + (kConsumers * which + consumer) * Staying::kBytes};
  }
  ATTN_DEVICE Passing streamed(int which, int stage) const {
    return {base + 2 * kConsumers * Staying::kBytes + (2 * stage + which) * Passing::kBytes};
  }
  ATTN_DEVICE char* rest() const { return streamed(0, kStages).data; }
  ATTN_DEVICE Barrier barrier(int i) const { return {reinterpret_cast<uint64_t*>(rest()) + i}; }
  ATTN_DEVICE Barrier there() const { return barrier(0); }  // what stays, where the copy engine brings it
  ATTN_DEVICE Barrier full(int stage) const { return barrier(1 + stage); }
  ATTN_DEVICE Barrier empty(int stage) const { return barrier(1 + kStages + stage); }
  ATTN_DEVICE Flags flags(int which) const { return reinterpret_cast<Flags>(rest() + 128 + kShape.block_n * which); }
  ATTN_DEVICE Rows& rows(int stage) const { return reinterpret_cast<Rows*>(rest() + 128 + 2 * kShape.block_n)[stage]; }

  // `arrivals` at what says that a stage is full, beside the bytes.
  ATTN_DEVICE void init(uint32_t arrivals) const {
    if (thread_index() == 0) {
      there().init(1);
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        full(stage).init(arrivals);
        empty(stage).init(4 * kConsumers);
      }
      fence_barriers();
    }
    sync_block();
  }
};

// By the lane that copies: the two tiles of this turn may come, and are waited for.
template <int kDim>
ATTN_DEVICE Barrier expect(const BackwardMemory<kDim>& memory, const Turn<BackwardMemory<kDim>::kStages>& turn) {
  memory.empty(turn.stage).wait(turn.parity ^ 1);
  memory.full(turn.stage).arrive_and_expect(2 * BackwardMemory<kDim>::Passing::kBytes);
  return memory.full(turn.stage);
}

// Starts s and dp of a turn: what stays, times what passes.
template <class M, int kDim>
ATTN_DEVICE void start_scores(Acc<1, kPassing<kDim> / 8>& s, Acc<1, kPassing<kDim> / 8>& dp,
                              const BackwardMemory<kDim>& memory, int consumer,
                              const Turn<BackwardMemory<kDim>::kStages>& turn) {
  memory.full(turn.stage).wait(turn.parity);
  products_begin();
  start_nt<M, kDim>(s, memory.stationary(0, consumer), memory.streamed(0, turn.stage));
  start_nt<M, kDim>(dp, memory.stationary(1, consumer), memory.streamed(1, turn.stage));
}

// body(n, i) for what a lane has of kN columns: row i >> 1 of its two, column 8 n + 2 t + (i & 1).
template <int kN, class Body>
ATTN_DEVICE void for_each_score(Body body) {
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) body(n, i);
}

// The gradient of a hidden score is as hidden as its probability, whatever delta is.
template <int kN>
ATTN_DEVICE void hide_gradients(Acc<1, kN / 8>& ds, const Acc<1, kN / 8>& p) {
  for_each_score<kN>([&](int n, int i) {
    if (is_hidden(p[0][n][i])) ds[0][n][i] = p[0][n][i];
  });
}

// Looks through a tile that passes, before a product in which hidden rows are zeros; whether flags tell of any.
template <class M, int kDim>
ATTN_DEVICE bool look_through(const BackwardMemory<kDim>& memory, int which, int stage) {
  return zero_nonfinite_rows<M, BackwardMemory<kDim>::kConsumers>(memory.streamed(which, stage), memory.flags(which));
}

}  // namespace attn_ops::cuda::hopper
