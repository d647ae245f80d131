// What the kernel of dk and dv makes of scores: p and ds of a tile with keys down and query rows across, of what is known
// of the rows that pass.
#pragma once

#include "backward.cuh"

namespace attn_ops::cuda {

// What is known of query rows that pass, in shared memory. Of each stage a maximum, a sum (whose inverse takes its
// place) and delta of each row; of the tile at hand alone lse_2 (FusedRow), which of the block's keys a row sees, and
// whether all rows fit (fits_fused). (Little: where two blocks share 100 KB, tiles leave each 1 KB.)
template <int kRows, int kKeys, bool kPlain>
struct StreamedRows {
  static_assert(kRows <= 32, "of one warp's lanes");
  static_assert(kKeys < 256, "SeenKeys");
  struct SeenKeys {
    uint8_t begin, end;  // behind first_key
  };
  float* numbers;  // [3][kRows]; not plain, [kRows][4]: together
  float* lse_2;
  SeenKeys* keys;
  uint32_t* fused;
  int first_key;

  ATTN_DEVICE StreamedRows(char* told, char* finished, int first_key)
      : numbers(reinterpret_cast<float*>(told)),
        lse_2(reinterpret_cast<float*>(finished)),
        keys(reinterpret_cast<SeenKeys*>(finished + 4 * kRows)),
        fused(reinterpret_cast<uint32_t*>(finished + 6 * kRows)),
        first_key(first_key) {}

  // Of row i: 0 the maximum, 1 the sum, 2 delta.
  ATTN_DEVICE float* number(int i, int n) const { return numbers + (kPlain ? n * kRows + i : 4 * i + n); }
  // Row i is the index-th of the head; where it does not exist, it sees nothing and is all zeros.
  ATTN_DEVICE void fetch(int i, const BackwardArgs& args, const Head& head, int index, bool exists) const {
    const int position = head.position(index);
    const int64_t row = head.statistic(head.head(index, position), position);
    const float* statistics = static_cast<const float*>(args.b.forward.statistics) + 2 * row;
    copy_async_few<4>(number(i, 0), statistics, exists);
    copy_async_few<4>(number(i, 1), statistics + 1, exists);
    copy_async_few<4>(number(i, 2), args.delta + row, exists);
  }
  // By the warp that has fetched them, once they have arrived; the first is row `first` of the head, which has `limit`.
  // kFused: whether exponents may be fused.
  template <bool kFused>
  ATTN_DEVICE void finish(const Head& head, int first, int limit) const {
    const int i = recomputed(lane_index());  // (kept, it spilled in float32 heads of 256: sm_80, 13.0)
    float* sum = number(i, 1);
    if (i < kRows) {
      *sum = RowGradient::inverse(*sum);
      const Interval seen = first + i < limit ? head.seen(first + i) : Interval{0, 0};
      const auto behind = [&](int key) { return static_cast<uint8_t>(clamp(key - first_key, 0, kKeys)); };
      keys[i] = {behind(seen.begin), behind(seen.end)};
    }
    if (!kFused) return;
    bool fits = true;
    if (i < kRows) {
      const RowGradient row = (*this)[i];
      lse_2[i] = row.fused().lse_2;
      fits = row.fits();
    }
    const bool any = any_in_warp(!fits);
    if (i == 0) *fused = !any;
  }
  // Those from `first` on.
  ATTN_DEVICE StreamedRows from(int first) const {
    StreamedRows rest = *this;
    rest.numbers = number(first, 0);
    rest.lse_2 += first;
    rest.keys += first;
    return rest;
  }
  ATTN_DEVICE RowGradient operator[](int i) const {
    if constexpr (kPlain) return {*number(i, 0), *number(i, 1), *number(i, 2)};
    const Bytes16 row = *reinterpret_cast<const Bytes16*>(number(i, 0));
    return {float_of(row.word[0]), float_of(row.word[1]), float_of(row.word[2])};
  }
  ATTN_DEVICE FusedRow fused_row(int i) const { return {lse_2[i], *number(i, 2)}; }
  ATTN_DEVICE Interval seen(int i) const { return {first_key + keys[i].begin, first_key + keys[i].end}; }
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

// Those of the head that see some of the keys first_key <= j < first_key + keys.
ATTN_DEVICE Interval rows_that_see(const Head& head, int first_key, int keys) {
  if (first_key >= head.length_k) return {0, 0};
  // Neither end of the rows' intervals ever moves back.
  const int limit = head.rows_in_length();
  return {first_row_where(limit, [&](int row) { return head.seen(row).end > first_key; }),
          first_row_where(limit, [&](int row) { return head.seen(row).begin >= first_key + keys; })};
}

// Which of a warp's 16 keys kMmaN times eight rows that pass see. The lanes share them: each reads of neighbours, for one
// row, what masks, ids and blocks say.
template <int kMmaN, int kUnroll>
struct ShownOfKeys {
  static constexpr int kRows = 8 * kMmaN, kKeys = kRows / 2;  // of a lane
  static_assert(kRows == 16 || kRows == 32, "all lanes have as many");
  uint32_t own = 0;

  // (The warp's first key, kept for this, spilled in float32 heads of 256 on sm_90a, 13.0.)
  template <class Streamed>
  ATTN_DEVICE void make(const Head& head, const Streamed& rows, int first_row) {
    const int thread = recomputed(thread_index()), lane = thread % 32, row = lane % kRows;
    const int index = first_row + row, position = head.position(index);
    const int own_key = rows.first_key + thread / 32 * 16 + lane / kRows * kKeys;
    own = shown_keys<kKeys, kUnroll>(head, head.head(index, position), position, rows.seen(row), own_key);
  }
  // Of a row: bits 0 and 8 are of keys g and 8 + g.
  ATTN_DEVICE uint32_t operator()(int row, int g) const {
    const uint32_t first = shuffle(own, row) >> g;
    return kKeys == 16 ? first : (first & 1u) | shuffle(own, kRows + row) >> g << 8;
  }
};

// s becomes p (what dropout leaves of it), dp becomes ds, with keys down and query rows across.
template <class M, bool kPlain, bool kWithDp, int kMmaM, int kMmaN, class Streamed, class Shown>
ATTN_DEVICE void pair_gradients(Acc<kMmaM, kMmaN>& s, Acc<kMmaM, kMmaN>& dp, const Streamed& rows,
                                const Shown& shown, const Head& head, int first_row, int first_key, bool sees_all) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  const float scale = head.factors.scale;
  static_assert(kPlain || kMmaM == 1, "KeptOfKeys knows 16 keys");
  const bool capped = !kPlain && head.factors.cap != 0.0f;
  const bool drops = !kPlain && head.factors.drop_below > 0;
  KeptOfKeys<kMmaN> kept;
  if (drops) kept.make(head, first_row, has_no_registers<M, kMmaN>() ? recomputed(first_key) : first_key);
  const auto of_all = [&](auto row_of) {
#pragma unroll
    for (int n = 0; n < kMmaN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto row = row_of(8 * n + 2 * t + i);
#pragma unroll
        for (int m = 0; m < kMmaM; ++m)
#pragma unroll
          for (int j = i; j < 4; j += 2) {
            float &x = s[m][n][j], &y = dp[m][n][j];
            x = row.probability(x, scale);
            if (kWithDp) y = row.of_score(x, y);
          }
      }
  };
  if (kPlain && sees_all) {
    if (kFuses<M> && *rows.fused != 0) of_all([&](int i) { return rows.fused_row(i); });
    else of_all([&](int i) { return rows[i]; });
    return;
  }
#pragma unroll
  for (int n = 0; n < kMmaN; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + 2 * t + i;
      const RowGradient row = rows[column];
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
      hide_or_scale<M, kPlain>(x, head, query_head, position, rows.seen(column), key);
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

}  // namespace attn_ops::cuda
