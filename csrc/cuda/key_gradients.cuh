// dk = scale ds^T q and dv = p^T d_out: a block keeps a tile of keys and values, all query rows that see any of them
// pass.
//
// Scores are computed transposed, keys down and query rows across: so p^T and ds^T are left operands without leaving
// the registers. All query heads of the key/value head pass, so their sum is made here.
#pragma once

#include "backward.cuh"

namespace attn_ops::cuda {

// What is known of the query rows that pass, in shared memory: of each a maximum, a sum (whose inverse takes its place)
// and delta, and which keys it sees.
struct StreamedRows {
  float* numbers;  // [rows][4]
  Interval* seen;

  ATTN_DEVICE StreamedRows(char* memory, int rows)
      : numbers(reinterpret_cast<float*>(memory)), seen(reinterpret_cast<Interval*>(memory + 16 * rows)) {
    static_assert(16 + sizeof(Interval) == kStreamedRowBytes, "");
  }

  // Row i is the index-th of the head; where it does not exist, it sees nothing and is all zeros.
  ATTN_DEVICE void fetch(int i, const BackwardArgs& args, const Head& head, int index, bool exists) const {
    const int position = head.position(index);
    const int64_t row = head.statistic(head.head(index, position), position);
    const float* statistics = static_cast<const float*>(args.b.forward.statistics) + 2 * row;
    copy_async_few<4>(numbers + 4 * i, statistics, exists);
    copy_async_few<4>(numbers + 4 * i + 1, statistics + 1, exists);
    copy_async_few<4>(numbers + 4 * i + 2, args.delta + row, exists);
    seen[i] = exists ? head.seen_at(position) : Interval{0, 0};
  }
  ATTN_DEVICE void invert_sum(int i) const { numbers[4 * i + 1] = RowGradient::inverse(numbers[4 * i + 1]); }
  ATTN_DEVICE RowGradient operator[](int i) const {
    const Bytes16 row = reinterpret_cast<const Bytes16*>(numbers)[i];
    return {float_of(row.word[0]), float_of(row.word[1]), float_of(row.word[2])};
  }
};

// The first row of the head for which `holds`, if it holds for all after as well.
template <class Predicate>
ATTN_DEVICE int first_row_where(int rows, Predicate holds) {
  int low = 0, high = rows;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (holds(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Which of a warp's 16 keys kMmaN times eight rows that pass see. The lanes share them: each reads of neighbours, for one
// row, what masks, ids and blocks say.
template <int kMmaN, int kUnroll>
struct ShownOfKeys {
  static constexpr int kRows = 8 * kMmaN, kKeys = kRows / 2;  // of a lane
  static_assert(kRows == 16 || kRows == 32, "all lanes have as many");
  uint32_t own = 0;

  // first_key: the block's. (The warp's, kept for this, spilled in float32 heads of 256 on sm_90a, 13.0.)
  ATTN_DEVICE void make(const Head& head, const StreamedRows& rows, int first_row, int first_key) {
    const int thread = recomputed(thread_index()), lane = thread % 32, row = lane % kRows;
    const int index = first_row + row, position = head.position(index);
    const int own_key = first_key + thread / 32 * 16 + lane / kRows * kKeys;
    own = shown_keys<kKeys, kUnroll>(head, head.head(index, position), position, rows.seen[row], own_key);
  }
  // Of a row: bits 0 and 8 are of keys g and 8 + g.
  ATTN_DEVICE uint32_t operator()(int row, int g) const {
    const uint32_t first = shuffle(own, row) >> g;
    return kKeys == 16 ? first : (first & 1u) | shuffle(own, kRows + row) >> g << 8;
  }
};

// s becomes p (what dropout leaves of it), dp becomes ds, with keys down and query rows across.
template <class M, bool kPlain, bool kWithDp, int kMmaM, int kMmaN, class Shown>
ATTN_DEVICE void pair_gradients(Acc<kMmaM, kMmaN>& s, Acc<kMmaM, kMmaN>& dp, const StreamedRows& rows,
                                const Shown& shown, const Head& head, int first_row, int first_key, bool sees_all) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  const float scale = head.factors.scale;
  static_assert(kPlain || kMmaM == 1, "KeptOfKeys knows 16 keys");
  const bool capped = !kPlain && head.factors.cap != 0.0f;
  const bool drops = !kPlain && head.factors.drop_below > 0;
  KeptOfKeys<kMmaN> kept;
  if (drops) kept.make(head, first_row, has_no_registers<M, kMmaN>() ? recomputed(first_key) : first_key);
#pragma unroll
  for (int n = 0; n < kMmaN; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      const RowGradient row = rows[column];
      if (kPlain && sees_all) {
#pragma unroll
        for (int m = 0; m < kMmaM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = s[m][n][2 * half + i];
            x = row.probability(product(x, scale));
            if (kWithDp) dp[m][n][2 * half + i] = row.of_score(x, dp[m][n][2 * half + i]);
          }
        continue;
      }
      const int index = recomputed(first_row + column);
      const int position = head.position(index), query_head = head.head(index, position);
      const KeysAcrossRows key{first_key + g, kPlain ? 0 : shown(column, g)};
      float x[2 * kMmaM];
#pragma unroll
      for (int j = 0; j < 2 * kMmaM; ++j) x[j] = s[j >> 1][n][2 * (j & 1) + i];
      float slope[2 * kMmaM];
      if (kWithDp && capped) {
#pragma unroll
        for (int j = 0; j < 2 * kMmaM; ++j) slope[j] = cap_slope(x[j], head.factors);
      }
      hide_or_scale<M, kPlain>(x, head, query_head, position, rows.seen[column], key);
#pragma unroll
      for (int j = 0; j < 2 * kMmaM; ++j) {
        float& own_p = s[j >> 1][n][2 * (j & 1) + i];
        float& own_dp = dp[j >> 1][n][2 * (j & 1) + i];
        const bool keeps = !drops || kept(j, n, i);
        const float d = !kWithDp || !keeps ? 0.0f : drops ? own_dp * head.factors.keep : own_dp;
        const float probability = row.probability_or_hidden(x[j]);
        const bool hidden = is_hidden(probability);
        own_p = keeps || hidden ? probability : 0.0f;
        if (kWithDp) {
          const float ds = row.of_score(probability, d);
          own_dp = hidden ? probability : capped ? through_cap(ds, slope[j]) : ds;
        }
      }
    }
}

template <class M, int kDim, bool kPlain, bool kWantsDk, bool kWantsDv>
ATTN_DEVICE void key_gradients(const BackwardArgs& args, int block) {
  using Element = typename M::Element;
  using Shape = BackwardShape<M, kDim, kPlain, false>;
  constexpr int kKeys = Shape::kBlockM, kRows = Shape::kBlockN, kThreads = Shape::kThreads;
  constexpr int kMmaM = Shape::kMmaM, kMmaN = Shape::kMmaN;
  static_assert(kRows <= kThreads, "a thread knows one of the rows that pass");
  const BackwardTiles<M, kDim, kPlain, false> tiles;
  const auto k = tiles.stationary(0), v = tiles.stationary(1);

  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const Head head(p, args.factors, args.rows, block / args.rows.tiles);
  const int first_key = block % args.rows.tiles * kKeys;
  const int warp_key = warp_index() * 16 * kMmaM;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int limit = head.rows_in_length();
  int begin = 0, end = 0;
  if (first_key < head.length_k) {
    // Neither end of the rows' intervals ever moves back.
    begin = round_down(first_row_where(limit, [&](int row) { return head.seen(row).end > first_key; }), kRows);
    end = first_row_where(limit, [&](int row) { return head.seen(row).begin >= first_key + kKeys; });
  }
  const auto next = [&](int row) {
    if constexpr (!kPlain) {
      const int end_key = min(first_key + kKeys, head.length_k);
      while (row < end && !head.blocks_show(row, min(row + kRows, end), first_key, end_key)) row += kRows;
    }
    return row;
  };
  begin = next(begin);
  const auto queries = [&](int first) { return QueryRows<const Element>(p.q, head, first, limit, args.aligned.q); };
  const auto d_outs = [&](int first) {
    return QueryRows<const Element>(b.d_out, head, first, limit, args.aligned.d_out);
  };
  const auto streamed_rows = [&](int stage) {
    return StreamedRows(tiles.rest() + stage * kRows * kStreamedRowBytes, kRows);
  };

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
          streamed_rows(stage).fetch(i, args, head, exists ? row + i : row, exists);
        }
      },
      [&](int stage) {
        if (thread_index() < kRows) streamed_rows(stage).invert_sum(thread_index());
      },
      [&](int row, int stage) {
        const auto q = tiles.streamed(0, stage), d_out = tiles.streamed(1, stage);
        ShownOfKeys<kMmaN, kShownUnroll<M, kDim>> shown;
        if (!kPlain) shown.make(head, streamed_rows(stage), row, first_key);
        Acc<kMmaM, kMmaN> s, dp;
        gemm_nt<M, kDim, kMmaM, kMmaN, true>(s, k, warp_key, q);
        if (kWantsDk) gemm_nt<M, kDim, kMmaM, kMmaN>(dp, v, warp_key, d_out);
        const bool sees_all = kPlain && RowBlock(head, row, kRows).sees_all(first_key, kKeys);
        pair_gradients<M, kPlain, kWantsDk, kMmaM, kMmaN>(s, dp, streamed_rows(stage), shown, head, row,
                                                          first_key + warp_key, sees_all);
        const bool loses = loses_nonfinite<M>(sees_all);
        if (kWantsDv) {
          const bool nonfinite = loses && zero_nonfinite_rows<M, kRows, kThreads>(d_out, tiles.flags());
          gemm_nn<M, kDim, kMmaM, kMmaN>(dv, s, d_out, value_dim);
          if (nonfinite) add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(dv, s, tiles.flags(), d_outs(row), value_dim);
        }
        if (kWantsDk) {
          const bool nonfinite = loses && zero_nonfinite_rows<M, kRows, kThreads>(q, tiles.flags());
          gemm_nn<M, kDim, kMmaM, kMmaN>(dk, dp, q, head_dim);
          if (nonfinite) add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(dk, dp, tiles.flags(), queries(row), head_dim);
        }
      });

  const auto store = [&](const auto& tile, const auto& gradient, float factor, const StridedView& view, int aligned,
                         int dim) {
    float factors[kMmaM][2];
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) factors[m][0] = factors[m][1] = factor;
    // Only this warp reads these rows of the tile, and it has done so.
    sync_warp();
    write_acc<M, kDim, kMmaM>(tile, warp_key, gradient, factors);
    sync_warp();
    const auto store_to = [&](const Head& own) {
      store_rows<M, kDim>(tile, warp_key, 16 * kMmaM,
                          KeyRows<Element>(view, own, first_key, static_cast<int>(p.seqlen_k), aligned), dim);
    };
    if constexpr (has_no_registers<M, kMmaN>()) {
      store_to(Head(p, args.factors, args.rows, recomputed(block) / args.rows.tiles));
    } else {
      store_to(head);
    }
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
