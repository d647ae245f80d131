// Tiles in shared memory as the copy engine writes and the tensor cores read them, and the products over them.
//
// A tile of rows is cut into panels of 64 columns of 16 bits: 128 bytes a row, rows one after the other, and the chunk
// c of 16 bytes of row r lies at c ^ (r & 7) ("128-byte swizzle"; panels begin at a multiple of 1024 bytes).
#pragma once

#include "../math.cuh"
#include "../tile.cuh"
#include "ptx.cuh"

namespace attn_ops::cuda::hopper {

constexpr int kPanelRowBytes = 2 * kPanelColumns;

// What wgmma is told of 16 summed indices of a tile: where it begins, and the steps in it, in units of 16 bytes ("Matrix
// Descriptor Format"). Rows along the summed index: `stride` leads from 8 rows to the next 8, `lead` is not looked at.
// Rows across it: `stride` leads from 8 summed indices to the next 8, `lead` from a panel to the next.
//
// `offset_bytes` from the tile's begin is added last: it is known to the compiler, which so computes one descriptor for a
// tile and one addition for each step. (With an address for each, thirteen instructions of the uniform path, one after
// the other, stood before each product, and took longer than it.)
ATTN_DEVICE uint64_t descriptor(const void* tile, int offset_bytes, int lead_bytes, int stride_bytes) {
  constexpr uint32_t kSwizzle128 = 1u << 30;
  const uint32_t low = shared_address(tile) >> 4 | static_cast<uint32_t>(lead_bytes >> 4) << 16;
  const uint32_t high = kSwizzle128 | static_cast<uint32_t>(stride_bytes >> 4);
  return static_cast<uint64_t>(high) << 32 | (low + static_cast<uint32_t>(offset_bytes >> 4));
}

// kRows rows of kDim columns.
template <int kRows, int kDim>
struct PanelTile {
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kChunks = kDim / 8, kPanelBytes = kRows * kPanelRowBytes, kBytes = kPanels * kPanelBytes;

  char* data;

  ATTN_DEVICE char* chunk(int row, int c) const {
    return data + (c >> 3) * kPanelBytes + row * kPanelRowBytes + (((c ^ row) & 7) << 4);
  }
  // Of the i-th chunk as they lie.
  ATTN_DEVICE static int row_of(int i) { return 16 * i % kPanelBytes / kPanelRowBytes; }
  // All rows, columns 16 k to 16 k + 16, which are summed over.
  ATTN_DEVICE uint64_t along(int k) const {
    return descriptor(data, (k >> 2) * kPanelBytes + (k & 3) * 32, 16, 8 * kPanelRowBytes);
  }
  // Rows 16 k to 16 k + 16, which are summed over, all columns.
  ATTN_DEVICE uint64_t across(int k) const {
    return descriptor(data, 16 * k * kPanelRowBytes, kPanelBytes, 8 * kPanelRowBytes);
  }
  // From the array of `map`, [batch, rows, heads, dim], as the copy engine counts: dim first.
  ATTN_DEVICE void copy(const TensorMap& map, int batch, int row, int head, Barrier barrier) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      copy_box(data + panel * kPanelBytes, map, panel * kPanelColumns, head, row, batch, barrier);
    }
  }
};

template <class M, int kN>
ATTN_DEVICE void multiply(float (&d)[1][kN / 8][4], uint64_t a, uint64_t b, int adds) {
  if constexpr (M::kMath == Math::kFloat16) multiply_f16(d, a, b, adds);
  else multiply_bf16(d, a, b, adds);
}
template <class M, int kN>
ATTN_DEVICE void multiply_registers(float (&d)[1][kN / 8][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (M::kMath == Math::kFloat16) multiply_registers_f16(d, a, b);
  else multiply_registers_bf16(d, a, b);
}

// Starts   d[i][j] = sum over the dimension of a[i] b[j].
template <class M, int kDim, int kRowsA, int kRowsB>
ATTN_DEVICE void start_nt(Acc<1, kRowsB / 8>& d, const PanelTile<kRowsA, kDim>& a, const PanelTile<kRowsB, kDim>& b) {
  // (Of heads of 256, eight steps at a time: with more, ptxas 13.0 spills.)
#pragma unroll(kDim / 16 < 8 ? kDim / 16 : 8)
  for (int k = 0; k < kDim / 16; ++k) multiply<M, kRowsB>(d, a.along(k), b.along(k), k > 0);
  products_commit();
}

// Results of a warpgroup rounded to elements: the left operand of a product over its kN columns.
template <int kN>
using Rounded = uint32_t[kN / 16][4];

template <class M, int kN>
ATTN_DEVICE void round_acc(Rounded<kN>& r, const Acc<1, kN / 8>& d) {
#pragma unroll
  for (int k = 0; k < kN / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r[k][i] = M::pack(d[0][2 * k + (i >> 1)][2 * (i & 1)], d[0][2 * k + (i >> 1)][2 * (i & 1) + 1]);
    }
}

// Starts   d[i][c] += sum over j of p[i][j] b[j][c].
template <class M, int kDim, int kN>
ATTN_DEVICE void start_nn(Acc<1, kDim / 8>& d, const Rounded<kN>& p, const PanelTile<kN, kDim>& b) {
#pragma unroll
  for (int k = 0; k < kN / 16; ++k) multiply_registers<M, kDim>(d, p[k], b.across(k));
  products_commit();
}

// Rows to a tile by the threads of a warpgroup, for columns below dim; what does not exist is zero. `rows` (rows.cuh)
// are aligned. They have arrived after copy_async_wait, for tensor cores after fence_writes and a barrier.
template <int kRows, int kDim, class Rows>
ATTN_DEVICE void load_rows(const PanelTile<kRows, kDim>& tile, const Rows& rows, int dim, int thread) {
  constexpr int kChunks = PanelTile<kRows, kDim>::kChunks;
#pragma unroll 4
  for (int i = thread; i < kRows * kChunks; i += kWarpgroup) {
    const int r = i / kChunks, c = i % kChunks;
    const bool exists = rows.exists(r) && 8 * c < dim;
    copy_async(tile.chunk(r, c), rows.row(r) + 8 * c, exists);
  }
}

// A warp's results, times factor[row], to rows first to first + 16 of `rows`, through a tile that its warpgroup is done
// with.
template <class M, int kRows, int kDim, class Rows>
ATTN_DEVICE void store_results(const PanelTile<kRows, kDim>& tile, int first, const Acc<1, kDim / 8>& results,
                               const float (&factor)[1][2], const Rows& rows, int dim) {
  const SharedTile<M, kDim> through{tile.data};
  write_acc<M, kDim, 1>(through, first, results, factor);
  sync_warp();
  store_rows<M, kDim>(through, first, 16, rows, dim);
}

}  // namespace attn_ops::cuda::hopper
