// ds of one tile of scores, for the kernels whose gradients are sums of it: bias_gradient.cuh, distance_gradient.cuh.
#pragma once

#include "query_gradient.cuh"

namespace attn_ops::cuda {

template <class M, int kDim>
struct ScoreGradientTile {
  using Element = typename M::Element;
  using Shape = BackwardShape<M, kDim, false, true>;
  static constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kThreads = Shape::kThreads;
  static constexpr int kMmaM = Shape::kMmaM, kMmaN = kBlockN / 8;

  // The rows of one query head are its positions.
  ATTN_DEVICE static Rows rows_of_head(const AttentionParams& p) {
    Rows rows;
    rows.count = static_cast<int>(p.seqlen_q);
    return rows;
  }
  ATTN_DEVICE static int kv_head_of(const AttentionParams& p, int query_head) {
    return query_head / (static_cast<int>(p.num_heads) / static_cast<int>(p.num_kv_heads));
  }

  // s becomes ds of kBlockM rows from `row` on and kBlockN keys from `key` on; what is hidden is -0. All threads call it;
  // shared memory is free afterwards.
  ATTN_DEVICE static void make(Acc<kMmaM, kMmaN>& s, const BackwardArgs& args, const Head& head, int row, int key) {
    const BackwardTiles<M, kDim, false, true> tiles;
    const auto q = tiles.stationary(0), d_out = tiles.stationary(1), k = tiles.streamed(0, 0), v = tiles.streamed(1, 0);
    const BackwardParams& b = args.b;
    const AttentionParams& p = b.forward;
    const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
    const int warp_row = warp_index() * 16 * kMmaM, limit = head.rows_in_length();
    load_tile<M, kDim, kBlockM, kThreads>(q, QueryRows<const Element>(p.q, head, row, limit, args.aligned.q), head_dim);
    load_tile<M, kDim, kBlockM, kThreads>(
        d_out, QueryRows<const Element>(b.d_out, head, row, limit, args.aligned.d_out), value_dim);
    load_tile<M, kDim, kBlockN, kThreads>(k, KeyRows<const Element>(p.k, head, key, head.length_k, args.aligned.k),
                                          head_dim);
    load_tile<M, kDim, kBlockN, kThreads>(v, KeyRows<const Element>(p.v, head, key, head.length_k, args.aligned.v),
                                          value_dim);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    Acc<kMmaM, kMmaN> dp;
    gemm_nt<M, kDim, kMmaM, kMmaN>(s, q, warp_row, k);
    gemm_nt<M, kDim, kMmaM, kMmaN>(dp, d_out, warp_row, v);
    const RowGradients<kMmaM> gradients(args, head, row + warp_row, true);
    score_gradients<M, false, false, kMmaM, kMmaN>(s, dp, gradients, head, row + warp_row, key, false);
    sync_block();
  }

  // A tile as plain float32 in shared memory, its rows kPitch apart: so that the eight that are written at a time lie on
  // different banks.
  static constexpr int kPitch = kBlockN + 8;
  static constexpr int kTableFloats = kBlockM * kPitch;
  ATTN_DEVICE static float* table() { return reinterpret_cast<float*>(shared_memory()); }
  ATTN_DEVICE static void write_table(const Acc<kMmaM, kMmaN>& tile) {
    const int g = lane_index() >> 2, t = lane_index() & 3, warp_row = warp_index() * 16 * kMmaM;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int n = 0; n < kMmaN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          table()[(warp_row + 16 * m + 8 * (i >> 1) + g) * kPitch + 8 * n + 2 * t + (i & 1)] = tile[m][n][i];
        }
    sync_block();
  }
};

}  // namespace attn_ops::cuda
