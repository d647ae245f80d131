// What is hidden must not leak (../finite.cuh), for tiles in panels and products of warpgroups.
#pragma once

#include "../finite.cuh"
#include "pipeline.cuh"

namespace attn_ops::cuda::hopper {

// Whether the tile has rows with numbers that are not finite; then flags them and makes them zero (../finite.cuh). All
// consumers call it, when the tile has arrived; it is ready for the tensor cores afterwards.
template <class M, int kConsumers, int kRows, int kDim>
ATTN_DEVICE bool zero_nonfinite_rows(const PanelTile<kRows, kDim>& tile, Flags flags, int thread) {
  using T = PanelTile<kRows, kDim>;
  constexpr int kChunks = T::kBytes / 16, kThreads = kConsumers * kWarpgroup;
  const auto is_finite = [&tile](int i) {
    return chunk_is_finite<M>(*reinterpret_cast<const Bytes16*>(tile.data + 16 * i));
  };
  const auto row = [](int i) { return 16 * i % T::kPanelBytes / kPanelRowBytes; };
  bool found = false;
#pragma unroll 1
  for (int i = thread; i < kChunks; i += kThreads) found |= !is_finite(i);
  if (!sync_some_or(kOfConsumers, kThreads, found)) return false;

  for (int r = thread; r < kRows; r += kThreads) flags[r] = 0;
  sync_some(kOfConsumers, kThreads);
#pragma unroll 1
  for (int i = thread; i < kChunks; i += kThreads) {
    if (!is_finite(i)) flags[row(i)] = 1;
  }
  sync_some(kOfConsumers, kThreads);
#pragma unroll 1
  for (int i = thread; i < kChunks; i += kThreads) {
    if (flags[row(i)]) *reinterpret_cast<Bytes16*>(tile.data + 16 * i) = Bytes16{{0, 0, 0, 0}};
  }
  fence_writes();
  sync_some(kOfConsumers, kThreads);
  return true;
}

//   d[i][c] += p[i][j] row_j[c]     for the flagged j, where p[i][j] is not hidden
template <class M, int kDim, int kN, class Rows>
ATTN_DEVICE void add_nonfinite_rows(Acc<1, kDim / 8>& d, const Rounded<kN>& p, Flags flags, const Rows& rows, int dim) {
  const int t = lane_index() & 3;
#pragma unroll 1
  for (int j = 0; j < kN; ++j) {
    if (!flags[j]) continue;
    const uint16_t* row = rows.row(j);
    const int owner = (lane_index() & ~3) | (j & 7) >> 1;
    uint16_t weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float own = 0.0f;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) replace_if_equal(own, float_of(p[n >> 1][2 * (n & 1) + half]), j >> 3, n);
      const uint32_t both = shuffle(bits_of(own), owner);
      weight[half] = static_cast<uint16_t>(both >> 16 * (j & 1));
    }
    constexpr uint16_t kHidden = kHiddenBits >> 16;  // -0 in either type
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = recomputed(8 * n + 2 * t + i);
        if (column >= dim) continue;
        const float value = M::to_float(row[column * rows.dim_stride]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (weight[half] != kHidden) d[0][n][2 * half + i] += M::to_float(weight[half]) * value;
        }
      }
  }
}

}  // namespace attn_ops::cuda::hopper
