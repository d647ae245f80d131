// What is hidden must not leak (../finite.cuh), for tiles in panels and products of warpgroups.
#pragma once

#include "../finite.cuh"
#include "pipeline.cuh"

namespace attn_ops::cuda::hopper {

// The warpgroups that compute, as ../tile.cuh has those who move a tile together.
template <int kConsumers>
struct Consumers {
  static constexpr int kThreads = kConsumers * kWarpgroup;

  ATTN_DEVICE static int thread_rank() { return thread_index() - kWarpgroup; }
  ATTN_DEVICE static void sync() { sync_some(kOfConsumers, kThreads); }
  ATTN_DEVICE static void publish() {
    fence_writes();
    sync();
  }
  ATTN_DEVICE static bool sync_or(bool value) { return sync_some_or(kOfConsumers, kThreads, value); }
};

// All consumers call it, when the tile has arrived.
template <class M, int kConsumers, int kRows, int kDim>
ATTN_DEVICE bool zero_nonfinite_rows(const PanelTile<kRows, kDim>& tile, Flags flags) {
  using Group = Consumers<kConsumers>;
  return cuda::zero_nonfinite_rows<M, kRows, Group::kThreads, Group>(tile, flags);
}

template <class M, int kDim, int kN, class Rows>
ATTN_DEVICE void add_nonfinite_rows(Acc<1, kDim / 8>& d, const Rounded<kN>& p, Flags flags, const Rows& rows, int dim) {
  add_flagged_rows<M, kDim, 1>(d, kN, flags, rows, dim, [&p](float (&weight)[1][2], int j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float both = 0.0f;  // of j and its neighbour
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) replace_if_equal(both, float_of(p[n >> 1][2 * (n & 1) + half]), j >> 3, n);
      weight[0][half] = (j & 1) == 0 ? M::low(bits_of(both)) : M::high(bits_of(both));
    }
  });
}

}  // namespace attn_ops::cuda::hopper
