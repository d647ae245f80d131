// Forward: a block keeps a tile of query rows, and all their keys and values pass.
//
//   s = scale q k^T + bias    m' = max(m, s)    p = e^(s - m')     l = e^(m - m') l + sum p     o = e^(m - m') o + p v
//   out = o / l                 lse = m + log l                      (with a sink, where there is one: join_sink)
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

// The running softmax of a warp's rows: maximum and this lane's part of the sum.
template <int kMmaM>
struct RowStatistics {
  float maximum[kMmaM][2], sum[kMmaM][2];

  ATTN_DEVICE RowStatistics() {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) maximum[m][half] = minus_infinity(), sum[m][half] = 0.0f;
  }

  // Takes the largest new score of a row as the lane sees it; returns what everything so far must be multiplied by.
  ATTN_DEVICE float raise(int m, int half, float largest) {
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    const float before = maximum[m][half], now = fmaxf(before, largest);
    maximum[m][half] = now;
    const float factor = before == now ? 1.0f : exponential(before - now);
    sum[m][half] *= factor;
    return factor;
  }
  // What is subtracted from scores: of a row that has seen nothing, 0.
  ATTN_DEVICE float subtrahend(int m, int half) const {
    return is_minus_infinity(maximum[m][half]) ? 0.0f : maximum[m][half];
  }
  ATTN_DEVICE void finish() {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += shuffle_xor(sum[m][half], 1);
        sum[m][half] += shuffle_xor(sum[m][half], 2);
      }
  }
};

template <int kMmaM, int kMmaN>
ATTN_DEVICE void scale_row(Acc<kMmaM, kMmaN>& d, int m, int half, float factor) {
#pragma unroll
  for (int n = 0; n < kMmaN; ++n) {
    d[m][n][2 * half] *= factor;
    d[m][n][2 * half + 1] *= factor;
  }
}

// Scores in, probabilities out, where every row sees every key and scale > 0: the fast case. rescale(m, half, factor)
// is told what a row's results so far are to be multiplied by.
template <int kMmaM, int kMmaN, class Rescale>
ATTN_DEVICE void softmax_of_all(Acc<kMmaM, kMmaN>& s, RowStatistics<kMmaM>& rows, float scale, Rescale rescale) {
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = s[m][0][2 * half];
#pragma unroll
      for (int n = 0; n < kMmaN; ++n) {
        largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      }
      // Multiplied apart, the largest score becomes exactly the maximum; fused, one of 10^9 would be off by 2^6.
      rescale(m, half, rows.raise(m, half, product(largest, scale)));
      const float maximum = rows.subtrahend(m, half);
      float sum = 0.0f;  // of this tile: one sum of all would lose the last bits of each
#pragma unroll
      for (int n = 0; n < kMmaN; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[m][n][i] = exponential(product(s[m][n][i], scale) - maximum);
          sum += s[m][n][i];
        }
      rows.sum[m][half] += sum;
    }
}

// The same where keys may be hidden, by whatever.
template <class M, bool kPlain, int kMmaM, int kMmaN, class Rescale>
ATTN_DEVICE void softmax_of_some(Acc<kMmaM, kMmaN>& s, RowStatistics<kMmaM>& rows, const Head& head, int first_row,
                                 int first_key, Rescale rescale) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = recomputed(first_row + 16 * m + 8 * half + g);
      const Interval seen = head.seen(row);
      const int position = head.position(row), query_head = head.head(row, position);
      const KeysAlongRow key{first_key, t};
      float x[2 * kMmaN];
#pragma unroll
      for (int i = 0; i < 2 * kMmaN; ++i) x[i] = s[m][i >> 1][2 * half + (i & 1)];
      hide_or_scale<M, kPlain>(x, head, query_head, position, seen, key);
      float largest = x[0];
#pragma unroll
      for (int i = 1; i < 2 * kMmaN; ++i) largest = fmaxf(largest, x[i]);
      rescale(m, half, rows.raise(m, half, largest));
      const float maximum = rows.subtrahend(m, half);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * kMmaN; ++i) {
        x[i] = probability(x[i], maximum);
        sum += x[i];
      }
      rows.sum[m][half] += sum;
      if (!kPlain && head.factors.drop_below > 0) {
        const KeptOfRow<kMmaN> kept(head, first_key, position, query_head);
#pragma unroll
        for (int i = 0; i < 2 * kMmaN; ++i) {
          if (!kept(i >> 1, i & 1)) x[i] = is_hidden(x[i]) ? x[i] : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kMmaN; ++i) s[m][i >> 1][2 * half + (i & 1)] = x[i];
    }
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
  const auto keys = [&](int first) { return KeyRows<const Element>(p.k, head, first, head.length_k, args.aligned.k); };
  const auto values = [&](int first) {
    return KeyRows<const Element>(p.v, head, first, head.length_k, args.aligned.v);
  };

  Acc<kMmaM, kDim / 8> o;
  clear<kMmaM, kDim / 8>(o);
  const auto rescale = [&o](int m, int half, float factor) { scale_row<kMmaM, kDim / 8>(o, m, half, factor); };
  RowStatistics<kMmaM> rows;
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
    if (sees_all) softmax_of_all<kMmaM, kMmaN>(s, rows, args.factors.scale, rescale);
    else softmax_of_some<M, kPlain, kMmaM, kMmaN>(s, rows, head, first_row, key, rescale);
    const bool nonfinite = loses_nonfinite<M>(sees_all) && zero_nonfinite_rows<M, kBlockN, kThreads>(v, flags);
    gemm_nn<M, kDim, kMmaM, kMmaN>(o, s, v, value_dim);
    if (nonfinite) add_nonfinite_rows<M, kDim, kMmaM, kMmaN>(o, s, flags, values(key), value_dim);
  }

  rows.finish();
  const int g = lane_index() >> 2;
  float factor[kMmaM][2];
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float maximum = rows.maximum[m][half], sum = rows.sum[m][half];
      const int row = first_row + 16 * m + 8 * half + g;
      const int position = head.position(row), query_head = head.head(row, position);
      const float kept = args.factors.keep * join_sink(p, query_head, maximum, sum);
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
