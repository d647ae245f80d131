// dk and dv as in key_gradients.cuh, of plain calls in 16 bits with a head dim of 128, with a block's warps in two
// dimensions, as FlashAttention-2 has them: a warp has 32 keys and 32 of the 64 rows of the scores, and of the gradients
// 32 keys and half of the columns. So a right operand serves two products where it was one of 16 keys a warp; in turn p
// and ds go through shared memory, in 16 bits, one after the other in the same place.
//
// There is room for one tile of queries and one of their gradients: the queries of the next come under the product of dv,
// the gradients under the scores.
#pragma once

#include "pair_gradients.cuh"

namespace attn_ops::cuda {

//   d[i][c] += sum over j of scores[i][j] passes[j][c]     of a warp's keys and columns
//
// `rows` is where what passes came from: hidden rows of it that are not finite leave the product. All threads call it.
template <class M, int kDim, int kThreads, int kRows, int kMmaM, int kColumns, class Rows>
ATTN_DEVICE void add_product(Acc<kMmaM, kColumns / 8>& d, const SharedTile<M, kRows>& scores, int key,
                             const SharedTile<M, kDim>& passes, int column, Rows rows, int dim, bool sees_all,
                             Flags flags) {
  const bool nonfinite = loses_nonfinite<M>(sees_all) && zero_nonfinite_rows<M, kRows, kThreads>(passes, flags);
  gemm_of_tiles<M, kRows, kDim, kMmaM, kColumns>(d, scores.from(key), passes.columns_from(column));
  if (!nonfinite) return;
  rows.base += column * rows.dim_stride;
  const auto weight_of = [&](float (&weight)[kMmaM][2], int j) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weight[m][half] = M::to_float(*scores.at(key + 16 * m + 8 * half + (lane_index() >> 2), j));
      }
  };
  add_flagged_rows<M, kColumns, kMmaM>(d, kRows, flags, rows, dim - column, weight_of);
}

template <class M, int kDim>
ATTN_DEVICE void exchanged_key_gradients(const BackwardArgs& args) {
  using Element = typename M::Element;
  using T = SharedTile<M, kDim>;
  constexpr int kKeys = kExchangedTile.block_m, kRows = kExchangedTile.block_n, kThreads = kExchangedTile.threads();
  constexpr int kSide = 32, kMmaM = kSide / 16, kMmaN = kSide / 8, kColumns = kDim / 2;
  static_assert(kKeys == 2 * kSide && kRows == 2 * kSide && kExchangedTile.warps == 4, "two by two warps");
  const T k{shared_memory()}, v{k.from(kKeys)}, q{v.from(kKeys)}, d_out{q.from(kRows)};
  const SharedTile<M, kRows> scores{d_out.from(kRows).data};  // p or ds
  char* rest = scores.from(kKeys).data;
  const auto told = [=](int side) { return StreamedRows<kSide>(rest + side * told_rows_bytes(kSide)); };
  const Flags flags = reinterpret_cast<Flags>(rest + 2 * told_rows_bytes(kSide));

  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const int block = block_index();
  const Head head(p, args.factors, args.rows, block / args.rows.tiles);
  const int first_key = recomputed(block % args.rows.tiles * kKeys);
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int limit = head.rows_in_length();
  const int side = warp_index() >> 1;  // of the rows, and of the columns
  const int warp_key = (warp_index() & 1) * kSide, warp_row = side * kSide, warp_column = side * kColumns;
  const Interval rows = rows_that_see(head, first_key, kKeys);
  const auto queries = [&](int first) { return QueryRows<const Element>(p.q, head, first, limit, args.aligned.q); };
  const auto d_outs = [&](int first) {
    return QueryRows<const Element>(b.d_out, head, first, limit, args.aligned.d_out);
  };
  const auto load_queries = [&](int row) {
    load_tile<M, kDim, kRows, kThreads>(q, queries(row), head_dim);
    if (const int i = thread_index(); i < kRows) {
      const bool exists = row + i < limit;
      told(i / kSide).fetch(i % kSide, args, head, exists ? row + i : row, exists);
    }
  };
  const float ones[kMmaM][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
  const auto exchange = [&](const Acc<kMmaM, kMmaN>& own) {
    write_acc<M, kRows, kMmaM, kSide>(scores, warp_key, own, ones, warp_row);
    sync_block();
  };
  const auto add_to = [&](auto& d, const auto& passes, const auto& from, int dim, bool all) {
    add_product<M, kDim, kThreads, kRows, kMmaM, kColumns>(d, scores, warp_key, passes, warp_column, from, dim, all, flags);
  };

  Acc<kMmaM, kColumns / 8> dk, dv;
  clear<kMmaM, kColumns / 8>(dk);
  clear<kMmaM, kColumns / 8>(dv);
  int row = round_down(rows.begin, kRows);
  if (row < rows.end) {
    load_tile<M, kDim, kKeys, kThreads>(k, KeyRows<const Element>(p.k, head, first_key, head.length_k, args.aligned.k),
                                        head_dim);
    load_tile<M, kDim, kKeys, kThreads>(v, KeyRows<const Element>(p.v, head, first_key, head.length_k, args.aligned.v),
                                        value_dim);
    load_queries(row);
    copy_async_commit();
  }
#pragma unroll 1
  for (; row < rows.end; row += kRows) {
    copy_async_wait<0>();
    if (warp_index() < kRows / kSide) told(warp_index()).template finish<true>();
    sync_block();  // the queries are here, p and the gradients of the tile before are no longer needed
    load_tile<M, kDim, kRows, kThreads>(d_out, d_outs(row), value_dim);
    copy_async_commit();
    Acc<kMmaM, kMmaN> s, dp;
    gemm_nt<M, kDim, kMmaM, kMmaN, true>(s, k, warp_key, q.from(warp_row));
    copy_async_wait<0>();
    sync_block();  // the gradients are here
    gemm_nt<M, kDim, kMmaM, kMmaN>(dp, v, warp_key, d_out.from(warp_row));
    const bool sees_all = RowBlock(head, row, kRows).sees_all(first_key, kKeys);
    pair_gradients<M, true, true, kMmaM, kMmaN>(s, dp, told(side), ShownOfKeys<kMmaN, 16>(), head, row + warp_row,
                                                first_key + warp_key, sees_all);
    exchange(dp);
    add_to(dk, q, queries(row), head_dim, sees_all);
    sync_block();  // neither ds nor the queries are needed any more
    if (row + kRows < rows.end) load_queries(row + kRows);
    copy_async_commit();
    exchange(s);
    add_to(dv, d_out, d_outs(row), value_dim, sees_all);
  }

  // Nobody needs keys and values any more: their places take the results.
  const auto write = [&](const SharedTile<M, kDim>& tile, const Acc<kMmaM, kColumns / 8>& gradient, float factor) {
    const float factors[kMmaM][2] = {{factor, factor}, {factor, factor}};
    write_acc<M, kDim, kMmaM, kColumns>(tile, warp_key, gradient, factors, warp_column);
  };
  write(k, dk, args.factors.scale);
  write(v, dv, args.factors.keep);
  sync_block();
  const auto store = [&](const SharedTile<M, kDim>& tile, const StridedView& view, int aligned, int dim) {
    const KeyRows<Element> target(view, again(head, block), first_key, static_cast<int>(p.seqlen_k), aligned);
    store_rows<M, kDim>(tile, 16 * warp_index(), 16, target, dim);
  };
  store(k, b.dk, args.aligned.dk, head_dim);
  store(v, b.dv, args.aligned.dv, value_dim);
}

}  // namespace attn_ops::cuda
