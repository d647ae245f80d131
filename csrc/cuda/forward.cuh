// Forward: a block keeps a tile of query rows, and all their keys and values pass.
//
//   s = scale q k^T + bias    m' = max(m, s)    p = e^(s - m')     l = e^(m - m') l + sum p     o = e^(m - m') o + p v
//   out = o / l                 lse = m + log l                      (with a sink, where there is one: join_sink)
//
// where m stands still while it is near enough (RowStatistics).
//
// Each warp owns 16 or 32 rows from the scores to the output, so the statistics of a row never leave a quad of lanes.
// The values of a tile are fetched while its scores are computed, the next keys while its values are used.
#pragma once

#include "dropout.cuh"
#include "finite.cuh"

namespace attn_ops::cuda {

// What forward leaves of a row for backward, and for the user where that is wanted. (Of lse alone, a weight could not
// be computed again as it was: e^(s - lse) has the rounding of lse, which counts where scores are far from zero.)
ATTN_DEVICE void write_statistics(const AttentionParams& p, int64_t row, float maximum, float sum) {
  float* statistics = static_cast<float*>(p.statistics) + 2 * row;
  statistics[0] = is_minus_infinity(maximum) ? 0.0f : maximum;  // of a row that sees no key
  statistics[1] = sum;
  if (p.lse != nullptr) static_cast<float*>(p.lse)[row] = sum == 0.0f ? minus_infinity() : maximum + log_of(sum);
}

// Weights are e^(s - reference), and what a warp has summed up is multiplied only when a row's maximum rises above that
// by more than a slack of 2^8 (FlashAttention-4's): after the first tiles hardly ever. In o / l the reference cancels.
//
// float16 has few bits below 2^-14 and none below 2^-24, but room above: its weights go up to 2^8, of 65504, and lose
// no bits for it. bfloat16 has values up to 3e38, of which no weight may make more, but room below: its reference is as
// much above the maximum, and weights stay below 1. float32 has no slack: backward shall see no rounding of finish().
template <class M>
constexpr float kSlack = sizeof(typename M::Element) == 2 ? 5.5451774f : 0.0f;  // 8 ln 2
template <class M>
constexpr float kSlackBelow = M::kMath == Math::kFloat16 ? 0.0f : kSlack<M>;

// The running softmax of a warp's rows: maximum, what is subtracted, and this lane's part of the sum.
template <class M, int kMmaM>
struct RowStatistics {
  float maximum[kMmaM][2], reference[kMmaM][2], sum[kMmaM][2];
  uint32_t fused = 0;  // whether all rows of the warp fit (fits_fused). As a bool it spilled on Hopper (13.0)

  ATTN_DEVICE RowStatistics() {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[m][half] = reference[m][half] = minus_infinity(), sum[m][half] = 0.0f;
      }
  }

  // Takes the largest new score of each row as the lane sees it. Where some row of the warp rises, rescale(factors) is
  // told what all results so far are to be multiplied with; of the other rows that is 1, so that no row's bits depend
  // on its neighbours.
  template <class Rescale>
  ATTN_DEVICE void raise(const float (&largest)[kMmaM][2], Rescale rescale) {
    constexpr float kAbove = kSlack<M> - kSlackBelow<M>;
    const auto rises = [this](int m, int half) {
      return maximum[m][half] > (kAbove > 0.0f ? reference[m][half] + kAbove : reference[m][half]);
    };
    bool any = false;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = largest[m][half];
        largest_of_quad(x);
        maximum[m][half] = fmaxf(maximum[m][half], x);
        any |= rises(m, half);
      }
    if (!any_in_warp(any)) return;
    float factor[kMmaM][2];
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factor[m][half] = 1.0f;
        if (!rises(m, half)) continue;
        const float before = reference[m][half];
        reference[m][half] = maximum[m][half] + kSlackBelow<M>;
        factor[m][half] = exponential(before - reference[m][half]);
        sum[m][half] *= factor[m][half];
      }
    bool fits = true;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) fits &= fits_fused(subtrahend(m, 0)) && fits_fused(subtrahend(m, 1));
    fused = kFuses<M> && !any_in_warp(!fits);
    rescale(factor);
  }
  // What is subtracted from scores: of a row that has seen nothing, 0.
  ATTN_DEVICE float subtrahend(int m, int half) const {
    return is_minus_infinity(reference[m][half]) ? 0.0f : reference[m][half];
  }
  // The lanes' parts of the sums become the sums of e^(s - maximum). Returns what makes the same of the results.
  struct Factors {
    float of[kMmaM][2];
  };
  ATTN_DEVICE Factors finish() {
    Factors factors;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum_of_quad(sum[m][half]);
        const float from = reference[m][half], to = maximum[m][half];
        factors.of[m][half] = from == to ? 1.0f : exponential(from - to);
        sum[m][half] *= factors.of[m][half];
      }
    return factors;
  }
};

template <int kMmaM, int kMmaN>
ATTN_DEVICE void scale_rows(Acc<kMmaM, kMmaN>& d, const float (&factor)[kMmaM][2]) {
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int n = 0; n < kMmaN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] *= factor[m][i >> 1];
}

// Scores in, weights out, where every row sees every key and scale > 0: the fast case. rescale as in RowStatistics.
template <class M, int kMmaM, int kMmaN, class Rescale>
ATTN_DEVICE void softmax_of_all(Acc<kMmaM, kMmaN>& s, RowStatistics<M, kMmaM>& rows, float scale, Rescale rescale) {
  float largest[kMmaM][2];
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[2] = {s[m][0][2 * half], s[m][0][2 * half + 1]};
#pragma unroll
      for (int n = 1; n < kMmaN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) x[i] = fmaxf(x[i], s[m][n][2 * half + i]);
      largest[m][half] = product(fmaxf(x[0], x[1]), scale);
    }
  rows.raise(largest, rescale);
  const auto weigh = [&](auto of_product) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float subtrahend = rows.subtrahend(m, half);
        float sum[2] = {0.0f, 0.0f};  // of this tile: one sum of all would lose the last bits of each
#pragma unroll
        for (int n = 0; n < kMmaN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = s[m][n][2 * half + i];
            x = of_product(x, subtrahend);
            sum[i] += x;
          }
        rows.sum[m][half] += sum[0] + sum[1];
      }
  };
  if (rows.fused) {
    weigh([=](float x, float subtrahend) { return fused_weight(x, scale, subtrahend * kLog2E); });
  } else {
    weigh([=](float x, float subtrahend) {  // of a row that fits the same bits, whatever its neighbours are
      const bool fits = kFuses<M> && fits_fused(subtrahend);
      return fits ? fused_weight(x, scale, subtrahend * kLog2E) : weight(x, scale, subtrahend);
    });
  }
}

// The same where keys may be hidden, by whatever.
template <class M, bool kPlain, int kMmaM, int kMmaN, class Rescale>
ATTN_DEVICE void softmax_of_some(Acc<kMmaM, kMmaN>& s, RowStatistics<M, kMmaM>& rows, const Head& head, int first_row,
                                 int first_key, Rescale rescale) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  // body(m, half, x, row, position): x are a lane's scores of a row.
  const auto for_each_row = [&](auto body) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = recomputed(first_row + 16 * m + 8 * half + g), position = head.position(row);
        float x[2 * kMmaN];
#pragma unroll
        for (int i = 0; i < 2 * kMmaN; ++i) x[i] = s[m][i >> 1][2 * half + (i & 1)];
        body(m, half, x, row, position);
#pragma unroll
        for (int i = 0; i < 2 * kMmaN; ++i) s[m][i >> 1][2 * half + (i & 1)] = x[i];
      }
  };
  float largest[kMmaM][2];
  for_each_row([&](int m, int half, float (&x)[2 * kMmaN], int row, int position) {
    hide_or_scale<M, kPlain>(x, head, head.head(row, position), position, head.seen(row), KeysAlongRow{first_key, t});
    largest[m][half] = x[0];
#pragma unroll
    for (int i = 1; i < 2 * kMmaN; ++i) largest[m][half] = fmaxf(largest[m][half], x[i]);
  });
  rows.raise(largest, rescale);
  for_each_row([&](int m, int half, float (&x)[2 * kMmaN], int row, int position) {
    const float reference = rows.subtrahend(m, half);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kMmaN; ++i) {
      x[i] = probability(x[i], reference);
      sum += x[i];
    }
    rows.sum[m][half] += sum;
    if (!kPlain && head.factors.drop_below > 0) {
      const KeptOfRow<kMmaN> kept(head, first_key, position, head.head(row, position));
#pragma unroll
      for (int i = 0; i < 2 * kMmaN; ++i) {
        if (!kept(i >> 1, i & 1)) x[i] = is_hidden(x[i]) ? x[i] : 0.0f;
      }
    }
  });
}

template <class M, int kDim, bool kPlain>
ATTN_DEVICE void forward(const ForwardArgs& args) {
  using Element = typename M::Element;
  using T = SharedTile<M, kDim>;
  constexpr Tile shape = forward_tile(M::kMath, kDim, kPlain);
  constexpr int kBlockM = shape.block_m, kBlockN = shape.block_n, kThreads = shape.threads();
  constexpr int kMmaM = kBlockM / 16 / shape.warps, kMmaN = kBlockN / 8;
  char* memory = shared_memory();
  const T q{memory}, k{q.data + kBlockM * T::kRowBytes}, v{k.data + kBlockN * T::kRowBytes};
  const Flags flags = reinterpret_cast<Flags>(v.data + kBlockN * T::kRowBytes);

  const AttentionParams& p = args.p;
  const Head head(p, args.factors, args.rows, block_index() / args.rows.tiles);
  // Under a causal mask the last rows see the most: they begin first.
  const int tile = args.rows.tiles - 1 - block_index() % args.rows.tiles;
  const RowBlock block(head, tile * kBlockM, kBlockM);
  const int warp_row = warp_index() * 16 * kMmaM, first_row = block.first + warp_row;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  using SomeKeys = KeyRows<const Element, kPlain && M::kMmaK == 16 && kDim <= 192>;
  const auto keys = [&](int first) { return SomeKeys(p.k, head, first, head.length_k, args.aligned.k); };
  const auto values = [&](int first) { return SomeKeys(p.v, head, first, head.length_k, args.aligned.v); };

  Acc<kMmaM, kDim / 8> o;
  clear<kMmaM, kDim / 8>(o);
  const auto rescale = [&o](const float (&factor)[kMmaM][2]) { scale_rows<kMmaM, kDim / 8>(o, factor); };
  RowStatistics<M, kMmaM> rows;
  const auto next = [&](int key) { return kPlain ? key : block.next_shown(head, key, kBlockN); };
  int key = next(round_down(block.any.begin, kBlockN));
  if (key < block.any.end) {
    // Queries that see nothing are not read.
    const QueryRows<const Element> queries(p.q, head, block.first, head.rows_in_length(), args.aligned.q);
    load_tile<M, kDim, kBlockM, kThreads>(q, queries, head_dim);
    load_tile<M, kDim, kBlockN, kThreads>(k, keys(key), head_dim);
    copy_async_commit();
  }
#pragma unroll 1
  for (int following; key < block.any.end; key = following) {
    following = next(key + kBlockN);
    copy_async_wait<0>();
    sync_block();  // the keys are here, the values of the tile before are no longer needed
    load_tile<M, kDim, kBlockN, kThreads>(v, values(key), value_dim);
    copy_async_commit();
    Acc<kMmaM, kMmaN> s;
    gemm_nt<M, kDim, kMmaM, kMmaN>(s, q, warp_row, k);
    copy_async_wait<0>();
    sync_block();  // the reverse
    if (following < block.any.end) {
      load_tile<M, kDim, kBlockN, kThreads>(k, keys(following), head_dim);
      copy_async_commit();
    }
    const bool sees_all = kPlain && block.sees_all(key, kBlockN);
    if (sees_all) softmax_of_all<M, kMmaM, kMmaN>(s, rows, args.factors.scale, rescale);
    else softmax_of_some<M, kPlain, kMmaM, kMmaN>(s, rows, head, first_row, key, rescale);
    const bool nonfinite = loses_nonfinite<M>(sees_all) && zero_nonfinite_rows<M, kBlockN, kThreads>(v, flags);
    gemm_nn<M, kDim, kMmaM, kMmaN>(o, s, v, value_dim);
    if (nonfinite) add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(o, s, flags, values(key), value_dim);
  }

  const auto finished = rows.finish();
  const int g = lane_index() >> 2;
  float factor[kMmaM][2];
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float maximum = rows.maximum[m][half], sum = rows.sum[m][half];
      const int row = first_row + 16 * m + 8 * half + g;
      const int position = head.position(row), query_head = head.head(row, position);
      const float kept = args.factors.keep * finished.of[m][half] * join_sink(p, query_head, maximum, sum);
      factor[m][half] = sum == 0.0f ? 0.0f : kept / sum;
      if ((lane_index() & 3) != 0 || row >= block.end) continue;
      write_statistics(p, head.statistic(query_head, position), maximum, sum);
    }
  // Only this warp reads these rows of the query tile, and it has done so.
  sync_warp();
  write_acc<M, kDim, kMmaM>(q, warp_row, o, factor);
  sync_warp();
  store_rows<M, kDim>(q, warp_row, 16 * kMmaM,
                      QueryRows<Element>(p.out, head, block.first, block.end, args.aligned.out), value_dim);
}

}  // namespace attn_ops::cuda
