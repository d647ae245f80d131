// What is hidden must not leak: where a row's probability is 0 because a key is hidden, 0 * inf or 0 * NaN of that
// key's value would be NaN. Tiles that are seen in part are therefore searched for rows with such numbers; those (there
// are hardly ever any) leave the matrix product as zeros and are added one by one, for whoever sees them.
#pragma once

#include "rows.cuh"
#include "scores.cuh"
#include "tile.cuh"

namespace attn_ops::cuda {

// A row of a tile with a number that is not finite; one byte each, in shared memory.
using Flags = uint8_t*;

// The exponent bits, all ones in infinities and NaN.
template <class M>
ATTN_DEVICE constexpr uint32_t infinity_bits() {
  return M::kMath == Math::kFloat16 ? 0x7c00u : M::kMath == Math::kBFloat16 ? 0x7f80u : kInfinityBits;
}

// (By value: by reference, it came in four loads for Hopper, with four times the passes over banks each.)
template <class M>
ATTN_DEVICE bool chunk_is_finite(Bytes16 chunk) {
  constexpr uint32_t infinity = infinity_bits<M>();
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(typename M::Element) == 2) {
      finite &= (chunk.word[i] & infinity) != infinity && (chunk.word[i] >> 16 & infinity) != infinity;
    } else {
      finite &= (chunk.word[i] & 0x7fffffffu) < infinity - kHalfOfTf32;  // what TF32 makes infinite is as bad
    }
  }
  return finite;
}

// Whether a product with rows that are not finite would be wrong: where some are hidden, and of float32 everywhere, as its
// parts in TF32 do not keep an infinity.
template <class M>
ATTN_DEVICE bool loses_nonfinite(bool sees_all) {
  return sizeof(typename M::Element) == 4 || !sees_all;
}

// Whether the tile has rows with numbers that are not finite; then flags them and makes them zero. All of `Group`
// must call it, when the tile has arrived; it is ready for use afterwards.
template <class M, int kRows, int kThreads, class Group = ThreadBlock, class T>
ATTN_DEVICE bool zero_nonfinite_rows(const T& tile, Flags flags) {
  const auto is_finite = [&tile](int i) {
    return chunk_is_finite<M>(*reinterpret_cast<const Bytes16*>(tile.data + 16 * i));
  };
  bool found = false;
#pragma unroll 1
  for (int i = Group::thread_rank(); i < kRows * T::kChunks; i += kThreads) found |= !is_finite(i);
  if (!Group::sync_or(found)) return false;

  for (int r = Group::thread_rank(); r < kRows; r += kThreads) flags[r] = 0;
  Group::sync();
#pragma unroll 1
  for (int i = Group::thread_rank(); i < kRows * T::kChunks; i += kThreads) {
    if (!is_finite(i)) flags[T::row_of(i)] = 1;
  }
  Group::sync();
#pragma unroll 1
  for (int i = Group::thread_rank(); i < kRows * T::kChunks; i += kThreads) {
    if (flags[T::row_of(i)]) *reinterpret_cast<Bytes16*>(tile.data + 16 * i) = Bytes16{{0, 0, 0, 0}};
  }
  Group::publish();
  return true;
}

//   d[i][c] += p[i][j] row_j[c]     for the flagged j of `count`, where p[i][j] is not hidden
//
// own(weight, j): p of row j, in the lane of each quad that has it. The rows are numbers of `Kept`.
template <class Kept, int kDim, int kMmaM, class Rows, class Own>
ATTN_DEVICE void add_flagged_rows(Acc<kMmaM, kDim / 8>& d, int count, Flags flags, const Rows& rows, int dim, Own own) {
  const int t = lane_index() & 3;
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    if (!flags[j]) continue;
    const typename Kept::Element* row = rows.row(j);
    const int owner = (lane_index() & ~3) | (j & 7) >> 1;
    float weight[kMmaM][2];
    own(weight, j);
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) weight[m][half] = shuffle(weight[m][half], owner);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = recomputed(8 * n + 2 * t + i);
        if (column >= dim) continue;
        const float value = Kept::to_float(row[column * rows.dim_stride]);
#pragma unroll
        for (int m = 0; m < kMmaM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (!is_hidden(weight[m][half])) d[m][n][2 * half + i] += weight[m][half] * value;
          }
      }
  }
}

// The rows are numbers of `Kept`, where they are not of M.
template <class M, int kDim, int kMmaM, int kMmaN, class Kept = M, class Rows>
ATTN_DEVICE void add_nonfinite_rows(Acc<kMmaM, kDim / 8>& d, const Acc<kMmaM, kMmaN>& p, Flags flags, const Rows& rows,
                                    int dim) {
  add_flagged_rows<Kept, kDim, kMmaM>(d, 8 * kMmaN, flags, rows, dim, [&p](float (&weight)[kMmaM][2], int j) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weight[m][half] = 0.0f;
#pragma unroll
        for (int n = 0; n < kMmaN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            replace_if_equal(weight[m][half], p[m][n][2 * half + i], (j >> 3) * 2 + (j & 1), 2 * n + i);
          }
      }
  });
}

}  // namespace attn_ops::cuda
