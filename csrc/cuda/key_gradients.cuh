// dk = scale ds^T q and dv = p^T d_out: a block keeps a tile of keys and values, all query rows that see any of them
// pass.
//
// Scores are computed transposed, keys down and query rows across: so p^T and ds^T are left operands without leaving
// the registers. All query heads of the key/value head pass, so their sum is made here.
#pragma once

#include "pair_gradients.cuh"

namespace attn_ops::cuda {

template <class M, int kDim, bool kPlain, bool kWantsDk, bool kWantsDv>
ATTN_DEVICE void key_gradients(const BackwardArgs& args, int block) {
  using Element = typename M::Element;
  using Shape = BackwardShape<M, kDim, kPlain, false>;
  constexpr int kKeys = Shape::kBlockM, kRows = Shape::kBlockN, kThreads = Shape::kThreads;
  constexpr int kMmaM = Shape::kMmaM, kMmaN = Shape::kMmaN, kStep = Shape::kStep;
  static_assert(kRows <= kThreads, "a thread knows one of the rows that pass");
  const BackwardTiles<M, kDim, kPlain, false> tiles;
  const auto k = tiles.stationary(0), v = tiles.stationary(1);

  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const Head head(p, args.factors, args.rows, block / args.key_tiles);
  const int first_key = block % args.key_tiles * kKeys;
  const int warp_key = warp_index() * 16 * kMmaM;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int limit = head.rows_in_length();
  const Interval rows = rows_that_see(head, first_key, kKeys);
  const int end = rows.end;
  const auto next = [&](int row) {
    if constexpr (!kPlain) {
      const int end_key = min(first_key + kKeys, head.length_k);
      while (row < end && !head.blocks_show(row, min(row + kRows, end), first_key, end_key)) row += kRows;
    }
    return row;
  };
  const int begin = next(round_down(rows.begin, kRows));
  const auto queries = [&](int first) { return QueryRows<const Element>(p.q, head, first, limit, args.aligned.q); };
  const auto d_outs = [&](int first) {
    return QueryRows<const Element>(b.d_out, head, first, limit, args.aligned.d_out);
  };
  const auto streamed_rows = [&](int stage) {
    return StreamedRows<kRows, kKeys, kPlain>(tiles.told(stage), tiles.finished(), first_key);
  };

  LeftOperands<M, kDim, kMmaM> kept_k, kept_v;
  Acc<kMmaM, kDim / 8> dk, dv;
  clear<kMmaM, kDim / 8>(dk);
  clear<kMmaM, kDim / 8>(dv);
  if (begin < end) {
    load_tile<M, kDim, kKeys, kThreads>(k, KeyRows<const Element>(p.k, head, first_key, head.length_k, args.aligned.k),
                                        head_dim);
    load_tile<M, kDim, kKeys, kThreads>(v, KeyRows<const Element>(p.v, head, first_key, head.length_k, args.aligned.v),
                                        value_dim);
  }
  stream<Shape::kStages, kRows>(
      begin, end, next,
      [&](int row, int stage) {
        load_tile<M, kDim, kRows, kThreads>(tiles.streamed(0, stage), queries(row), head_dim);
        load_tile<M, kDim, kRows, kThreads>(tiles.streamed(1, stage), d_outs(row), value_dim);
        if (const int i = thread_index(); i < kRows) {
          const bool exists = row + i < limit;
          streamed_rows(stage).fetch(i, args, kPlain ? anew(head) : head, exists ? row + i : row, exists);
        }
      },
      [&] {
        if constexpr (Shape::kKeeps) keep(kept_k, k, kept_v, v, warp_key);
      },
      [&](int row, int stage) {
        if (warp_index() != 0) return;
        streamed_rows(stage).template finish<kPlain && kFuses<M>>(kPlain ? anew(head) : head, row, limit);
      },
      [&](int row, int stage) {
        const bool sees_all = kPlain && RowBlock(anew(head), row, kRows).sees_all(first_key, kKeys);
        const bool loses = loses_nonfinite<M>(sees_all);
#pragma unroll 1
        for (int step = 0; step < kRows; step += kStep) {
          const int own = row + step;
          const auto q = tiles.streamed(0, stage).from(step), d_out = tiles.streamed(1, stage).from(step);
          const auto told = streamed_rows(stage).from(step);
          ShownOfKeys<kMmaN, kShownUnroll<M, kDim>> shown;
          if constexpr (!kPlain) shown.make(head, told, own);
          Acc<kMmaM, kMmaN> s, dp;
          if constexpr (Shape::kKeeps) {
            gemm_nt<M, kDim, kMmaM, kMmaN>(s, kept_k, q);
            gemm_nt<M, kDim, kMmaM, kMmaN>(dp, kept_v, d_out);
          } else {
            gemm_nt<M, kDim, kMmaM, kMmaN, true>(s, k, warp_key, q);
            if (kWantsDk) gemm_nt<M, kDim, kMmaM, kMmaN>(dp, v, warp_key, d_out);
          }
          pair_gradients<M, kPlain, kWantsDk, kMmaM, kMmaN>(s, dp, told, shown, head, own, first_key + warp_key,
                                                            sees_all);
          if (kWantsDv) {
            const bool nonfinite = loses && zero_nonfinite_rows<M, kStep, kThreads>(d_out, tiles.flags());
            gemm_nn<M, kDim, kMmaM, kMmaN>(dv, s, d_out, value_dim);
            if (nonfinite) add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(dv, s, tiles.flags(), d_outs(own), value_dim);
          }
          if (kWantsDk) {
            const bool nonfinite = loses && zero_nonfinite_rows<M, kStep, kThreads>(q, tiles.flags());
            gemm_nn<M, kDim, kMmaM, kMmaN>(dk, dp, q, head_dim);
            if (nonfinite) add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(dk, dp, tiles.flags(), queries(own), head_dim);
          }
        }
      });

  const auto store = [&](const auto& tile, const auto& gradient, float factor, const StridedView& view, int aligned,
                         int dim) {
    float factors[kMmaM][2];
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) factors[m][0] = factors[m][1] = factor;
    // Only this warp reads these rows of the tile (or nobody any more), and it has done so.
    sync_warp();
    write_acc<M, kDim, kMmaM>(tile, warp_key, gradient, factors);
    sync_warp();
    const Head own = again(head, block, args.key_tiles);
    const KeyRows<Element> target(view, own, first_key, static_cast<int>(p.seqlen_k), aligned);
    store_rows<M, kDim>(tile, warp_key, 16 * kMmaM, target, dim);
  };
  if (kWantsDk) store(k, dk, args.factors.scale, b.dk, args.aligned.dk, head_dim);
  if (kWantsDv) store(v, dv, args.factors.keep, b.dv, args.aligned.dv, value_dim);
}

template <class M, int kDim, bool kPlain>
ATTN_DEVICE void key_gradients(const BackwardArgs& args) {
  if constexpr (splits_dk_dv(M::kMath, kDim)) {
    if (block_index() & 1) {
      key_gradients<M, kDim, kPlain, true, false>(args, block_index() >> 1);
    } else {
      key_gradients<M, kDim, kPlain, false, true>(args, block_index() >> 1);
    }
  } else {
    key_gradients<M, kDim, kPlain, true, true>(args, block_index());
  }
}

}  // namespace attn_ops::cuda
