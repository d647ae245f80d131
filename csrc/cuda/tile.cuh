// Tiles of rows in shared memory, and the products over them.
//
// A row is cut into chunks of 16 bytes, and chunk c of row r lies at place c ^ swizzle(r): so that the eight rows of a
// load_matrices, and the sixteen bytes that each lane stores, fall on different banks.
#pragma once

#include "math.cuh"
#include "workarounds.cuh"

namespace attn_ops::cuda {

template <class M, int kDim>
struct SharedTile {
  using Element = typename M::Element;
  static constexpr int kPerChunk = 16 / sizeof(Element);
  static constexpr int kChunks = kDim / kPerChunk;
  static constexpr int kRowBytes = kDim * sizeof(Element);

  char* data;

  // Rows of 8 n chunks begin on the same bank, others (dim 96 in 16 bits) half of them on another.
  static constexpr int kSwizzled = kChunks % 8 == 0 ? 8 : 4;  // chunks that change places with each other
  ATTN_DEVICE static int swizzle(int row) { return kSwizzled == 8 ? row & 7 : row >> 1 & 3; }
  ATTN_DEVICE char* chunk(int row, int c) const { return data + row * kRowBytes + ((c ^ swizzle(row)) << 4); }
  // Its rows from `first` on, a multiple of 8.
  ATTN_DEVICE SharedTile from(int first) const { return {data + first * kRowBytes}; }
  // Of the i-th chunk as they lie: those of a row lie within it, in whatever order.
  ATTN_DEVICE static int row_of(int i) { return i / kChunks; }
  ATTN_DEVICE Element* at(int row, int column) const {
    return reinterpret_cast<Element*>(chunk(row, column / kPerChunk)) + column % kPerChunk;
  }
};

// --- Between global and shared memory -------------------------------------------------------------------------------

// The threads that move a tile together. After publish(), products see what they have written. rank_anew() is for ways
// that are hardly taken: what follows from it is not kept for them (sm_100, 13.0).
struct ThreadBlock {
  ATTN_DEVICE static int thread_rank() { return thread_index(); }
  ATTN_DEVICE static int rank_anew() { return recomputed(thread_index()); }
  ATTN_DEVICE static void sync() { sync_block(); }
  ATTN_DEVICE static void publish() { sync(); }
  ATTN_DEVICE static bool sync_or(bool value) { return sync_block_or(value); }
};
struct Warp {
  ATTN_DEVICE static int thread_rank() { return lane_index(); }
  ATTN_DEVICE static int rank_anew() { return lane_index(); }
  ATTN_DEVICE static void sync() { sync_warp(); }
  ATTN_DEVICE static void publish() { sync(); }
  ATTN_DEVICE static bool sync_or(bool value) {
    sync_warp();
    return any_in_warp(value);
  }
};

// `rows.row(r)` is where row r of the tile is in global memory if rows.exists(r), else it is zero; it has dim elements.
// What is moved asynchronously has arrived after copy_async_wait, the rest at once: a barrier follows in either case.
template <class M, int kDim, int kRows, int kThreads, class Group = ThreadBlock, class Rows>
ATTN_DEVICE void load_tile(const SharedTile<M, kDim>& tile, const Rows& rows, int dim) {
  using T = SharedTile<M, kDim>;
  using Element = typename M::Element;
  if (rows.aligned == 16) {
    // A thread keeps to one of the chunks that change places with each other, and to every kStep-th row: what follows
    // from either is computed once.
    constexpr int kStep = kThreads / T::kSwizzled;
    const uint32_t thread = Group::thread_rank(), own = thread % T::kSwizzled, first = thread / T::kSwizzled;
#pragma unroll(kLoadUnroll<M>)
    for (int step = 0; step < kRows; step += kStep) {
      const int r = static_cast<int>(first) + step;
      if (kRows % kStep != 0 && r >= kRows) break;
      const Element* source = rows.row(r) + own * T::kPerChunk;
      const bool exists = rows.exists(r);
      char* target = tile.chunk(r, own);
#pragma unroll
      for (int c = 0; c < T::kChunks; c += T::kSwizzled) {
        const int d = c * T::kPerChunk;
        copy_async(target + 16 * c, source + d, exists && static_cast<int>(own * T::kPerChunk) + d < dim);
      }
    }
  } else if (rows.aligned != 0) {
    // Eight bytes at a time, or twice four.
    constexpr int kHalves = 2 * T::kChunks;  // of chunks, in a row
#pragma unroll 1
    for (int i = Group::rank_anew(); i < kRows * kHalves; i += kThreads) {
      const int r = i / kHalves, half = i % kHalves;
      const char* source = reinterpret_cast<const char*>(rows.row(r)) + 8 * half;
      char* target = tile.chunk(r, half >> 1) + 8 * (half & 1);
      const int left = rows.exists(r) ? dim * static_cast<int>(sizeof(Element)) - 8 * half : 0;
      if (rows.aligned == 8) {
        copy_async_few<8>(target, source, left > 0);
      } else {
        copy_async_few<4>(target, source, left > 0);
        copy_async_few<4>(target + 4, source + 4, left > 4);
      }
    }
  } else {
#pragma unroll 1
    for (int i = Group::rank_anew(); i < kRows * kDim; i += kThreads) {
      const int r = i / kDim, d = i % kDim;
      *tile.at(r, d) = rows.exists(r) && d < dim ? rows.row(r)[d * rows.dim_stride] : Element{};
    }
  }
}

// Rows first to first + count of the tile to global memory, by the lanes of one warp.
template <class M, int kDim, class Rows>
ATTN_DEVICE void store_rows(const SharedTile<M, kDim>& tile, int first, int count, const Rows& rows, int dim) {
  using T = SharedTile<M, kDim>;
  using Element = typename M::Element;
  if (rows.aligned == 16) {
#pragma unroll 1
    for (int i = lane_index(); i < count * T::kChunks; i += 32) {
      const int r = first + i / T::kChunks, c = i % T::kChunks;
      if (!rows.exists(r) || c * T::kPerChunk >= dim) continue;
      auto* target = reinterpret_cast<Bytes16*>(rows.row(r) + c * T::kPerChunk);
      *target = *reinterpret_cast<const Bytes16*>(tile.chunk(r, c));
    }
  } else {
#pragma unroll 1
    for (int i = lane_index(); i < count * kDim; i += 32) {
      const int r = first + i / kDim, d = i % kDim;
      if (rows.exists(r) && d < dim) rows.row(r)[d * rows.dim_stride] = *tile.at(r, d);
    }
  }
}

// --- Operands -------------------------------------------------------------------------------------------------------
//
// `lane` is operand_lane().

// Where a lane's row for load_matrices begins: `row` and `chunk` (0 to 3) are the lane's, what is added to them is known
// to the compiler. As rows begin at a multiple of the chunks that change places, these do by an exclusive or of the
// address: so few numbers serve all steps of a product, with what is added to them in the instruction. (Of address bits
// that are known to be 0 the compiler makes another way to add, and so an instruction for each address.)
template <class T>
struct LaneRow {
  T tile;
  int row, chunk;
  SharedAddress begin = 0;
  static constexpr bool kOneAddress = has_one_address<T::kRowBytes>();

  ATTN_DEVICE LaneRow(const T& tile, int row, int chunk) : tile(tile), row(row), chunk(chunk ^ T::swizzle(row)) {
    if (kOneAddress) begin = opaque(shared_address(tile.data) + row * T::kRowBytes + (this->chunk << 4));
  }
  // `rows` (a multiple of 8) further down, 2 k chunks to the right.
  ATTN_DEVICE SharedAddress at(int rows, int k) const {
    constexpr int kLow = T::kSwizzled - 1;
    const int low = 2 * k & kLow, high = (2 * k & ~kLow) << 4;
    if (kOneAddress) return (begin ^ low << 4) + (rows * T::kRowBytes + high);
    return shared_address(tile.data + (rows + row) * T::kRowBytes + ((chunk ^ low) << 4) + high);
  }
};

// Rows first to first + 16 (a multiple of 8), step k along the row.
template <class M, int kDim>
ATTN_DEVICE typename M::A load_a(const SharedTile<M, kDim>& tile, int first, int k, int lane) {
  uint32_t r[4];
  load_matrices(r, LaneRow<SharedTile<M, kDim>>(tile, lane & 15, lane >> 4).at(first, k));
  return M::a(r);
}

// The rows of the tile as columns: two operands, of rows first to first + 8 and the next 8.
template <class M, int kDim>
ATTN_DEVICE void load_b(typename M::B (&b)[2], const SharedTile<M, kDim>& tile, int first, int k, int lane) {
  uint32_t r[4];
  const int row = (lane & 7) + (lane >> 4 << 3);
  load_matrices(r, LaneRow<SharedTile<M, kDim>>(tile, row, lane >> 3 & 1).at(first, k));
  b[0] = M::b(r[0], r[1]);
  b[1] = M::b(r[2], r[3]);
}

// The same of 8 rows alone, for steps k and k + 1.
template <class M, int kDim>
ATTN_DEVICE void load_b_of_8(typename M::B (&b)[2], const SharedTile<M, kDim>& tile, int first, int k, int lane) {
  uint32_t r[4];
  load_matrices(r, LaneRow<SharedTile<M, kDim>>(tile, lane & 7, lane >> 3).at(first, k));
  b[0] = M::b(r[0], r[1]);
  b[1] = M::b(r[2], r[3]);
}

// The tile as it lies: rows first to first + kMmaK are summed over, of columns 16 n to 16 n + 8 and the next 8.
template <class M, int kDim>
ATTN_DEVICE void load_b_transposed(typename M::B (&b)[2], const SharedTile<M, kDim>& tile, int first, int n, int lane) {
  using T = SharedTile<M, kDim>;
  if constexpr (M::kMmaK == 16) {
    uint32_t r[4];
    load_matrices_transposed(r, LaneRow<T>(tile, lane & 15, lane >> 4).at(first, n));
    b[0] = M::b(r[0], r[1]);
    b[1] = M::b(r[2], r[3]);
  } else {
    // Rows 2 t and 2 t + 1 of the eight: the order in which a_from_acc has them. What is known to the compiler is added
    // last, so that few registers do for all the n.
    constexpr int kLow = T::kSwizzled - 1;
    const int g = lane >> 2, row = 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t r[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int chunk = 2 * (2 * n + i), own = (g >> 2 ^ T::swizzle(row + j)) ^ (chunk & kLow);
        const char* from = tile.data + (first + row + j) * T::kRowBytes + (own << 4) + ((chunk & ~kLow) << 4);
        r[j] = reinterpret_cast<const uint32_t*>(from)[g & 3];
      }
      b[i] = M::b(r[0], r[1]);
    }
  }
}

// --- Products -------------------------------------------------------------------------------------------------------
//
// A warp's accumulators: kMmaM times 16 rows, kMmaN times 8 columns.
template <int kMmaM, int kMmaN>
using Acc = float[kMmaM][kMmaN][4];

template <int kMmaM, int kMmaN>
ATTN_DEVICE void clear(Acc<kMmaM, kMmaN>& d) {
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int n = 0; n < kMmaN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] = 0.0f;
}

// Infinities do not survive 3xTF32, nor do the largest finite numbers. Wherever a product is NaN, what one product of
// operands that are cut off gives is right instead: the true NaN, or the infinity. (There are hardly ever any.)
template <class M, int kDim, int kMmaM, int kMmaN>
ATTN_DEVICE void restore_infinities(Acc<kMmaM, kMmaN>& d, const SharedTile<M, kDim>& a, int first,
                                    const SharedTile<M, kDim>& b) {
  bool found = false;
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int n = 0; n < kMmaN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) found |= d[m][n][i] != d[m][n][i];
  if (!any_in_warp(found)) return;
  const SharedTile<CutOff, kDim> left{a.data}, right{b.data};
  const int lane = operand_lane<M>();
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int n = 0; n < kMmaN; ++n) {
      float once[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
      for (int k = 0; k < kDim / M::kMmaK; k += 2) {
        CutOff::B columns[2];
        load_b_of_8<CutOff>(columns, right, 8 * n, k, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) CutOff::mma(once, load_a<CutOff>(left, first + 16 * m, k + i, lane), columns[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] = d[m][n][i] != d[m][n][i] ? once[i] : d[m][n][i];
    }
}

//   d[i][j] = sum over the dimension of a[first + i] b[j]
//
// kTransposed: to the last bit what the product of b and a has at [j][i]. A score that is computed again must be the
// same: one of 10^20, off by its rounding, has a weight of 0 or of 1.
template <class M, int kDim, int kMmaM, int kMmaN, bool kTransposed = false>
ATTN_DEVICE void gemm_nt(Acc<kMmaM, kMmaN>& d, const SharedTile<M, kDim>& a, int first, const SharedTile<M, kDim>& b,
                         int lane = operand_lane<M>()) {
  clear<kMmaM, kMmaN>(d);
  const auto own = a.from(first);
  const auto multiply = [](float (&d)[4], const typename M::A& left, const typename M::B& right) {
    if constexpr (kTransposed && M::kMath == Math::kFloat32) {
      M::mma_transposed(d, left, right);
    } else {
      M::mma(d, left, right);
    }
  };
  if constexpr (kMmaN == 1) {
#pragma unroll 2
    for (int k = 0; k < kDim / M::kMmaK; k += 2) {
      typename M::B right[2];
      load_b_of_8<M>(right, b, 0, k, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int m = 0; m < kMmaM; ++m) multiply(d[m][0], load_a<M>(own, 16 * m, k + i, lane), right[i]);
    }
  } else {
#pragma unroll(kGemmUnroll<M, kDim>)
    for (int k = 0; k < kDim / M::kMmaK; ++k) {
      typename M::A left[kMmaM];
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) left[m] = load_a<M>(own, 16 * m, k, lane);
#pragma unroll
      for (int n = 0; n < kMmaN; n += 2) {
        typename M::B right[2];
        load_b<M>(right, b, 8 * n, k, lane);
#pragma unroll
        for (int m = 0; m < kMmaM; ++m) {
          multiply(d[m][n], left[m], right[0]);
          multiply(d[m][n + 1], left[m], right[1]);
        }
      }
    }
  }
  if constexpr (M::kMath == Math::kFloat32) restore_infinities<M, kDim, kMmaM, kMmaN>(d, a, first, b);
}

// Left operands of a product over the dimension, kept in registers: kMmaM times 16 rows of a tile, from `first` on.
template <class M, int kDim, int kMmaM>
struct LeftOperands {
  typename M::A a[kMmaM][kDim / M::kMmaK];

  ATTN_DEVICE void load(const SharedTile<M, kDim>& tile, int first) {
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int k = 0; k < kDim / M::kMmaK; ++k) a[m][k] = load_a<M>(tile, first + 16 * m, k, lane_index());
  }
};

// The same of such operands.
template <class M, int kDim, int kMmaM, int kMmaN>
ATTN_DEVICE void gemm_nt(Acc<kMmaM, kMmaN>& d, const LeftOperands<M, kDim, kMmaM>& a, const SharedTile<M, kDim>& b) {
  clear<kMmaM, kMmaN>(d);
#pragma unroll
  for (int k = 0; k < kDim / M::kMmaK; ++k)
#pragma unroll
    for (int n = 0; n < kMmaN; n += 2) {
      typename M::B right[2];
      load_b<M>(right, b, 8 * n, k, lane_index());
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) {
        M::mma(d[m][n], a.a[m][k], right[0]);
        M::mma(d[m][n + 1], a.a[m][k], right[1]);
      }
    }
}

// Columns 16 k to 16 k + 16 of a row of accumulators as an operand of 16 bits.
template <class M, int kMmaN>
ATTN_DEVICE typename M::A rounded_a(const float (&p)[kMmaN][4], int k) {
  float both[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) both[i >> 2][i & 3] = p[2 * k + (i >> 2)][i & 3];
  return a_from_acc<M, false>(both);
}

//   d[i][c] += sum over j of p[i][j] b[j][c]     for c < columns, and for some of the zeros beyond
//
// p is rounded to an element, or is the sum of kParts of them.
template <class M, int kDim, int kMmaM, int kMmaN, int kParts = 1>
ATTN_DEVICE void gemm_nn(Acc<kMmaM, kDim / 8>& d, const Acc<kMmaM, kMmaN>& p, const SharedTile<M, kDim>& b, int columns,
                         int lane = operand_lane<M>()) {
#pragma unroll
  for (int k = 0; k < 8 * kMmaN / M::kMmaK; ++k) {
    typename M::A left[kMmaM][kParts];
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
      float rest[M::kMmaK / 8][4];
#pragma unroll
      for (int i = 0; i < M::kMmaK / 2; ++i) rest[i >> 2][i & 3] = p[m][k * (M::kMmaK / 8) + (i >> 2)][i & 3];
#pragma unroll
      for (int part = 0; part < kParts; ++part) left[m][part] = a_from_acc<M, (kParts > 1)>(rest);
    }
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      if (asks_for_columns<M, kDim>(n) && 16 * n >= columns) break;
      typename M::B right[2];
      load_b_transposed<M>(right, b, k * M::kMmaK, n, lane);
#pragma unroll
      for (int m = 0; m < kMmaM; ++m)
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          M::mma(d[m][2 * n], left[m][part], right[0]);
          M::mma(d[m][2 * n + 1], left[m][part], right[1]);
        }
    }
  }
}

// Two such products with the same right operand, which is read once:
//
//   d[i][c] += sum over j of p[i][j] b[j][c]     e[i][c] += sum over j of w[i][j] b[j][c]
//
// sums[i] has the sums of p[i][j] and of w[i][j], as they were rounded, in its even and odd columns: they are products
// too, with columns of ones.
template <class M, int kDim, int kMmaM, int kMmaN>
ATTN_DEVICE void gemm_nn_pair(Acc<kMmaM, kDim / 8>& d, Acc<kMmaM, kDim / 8>& e, float (&sums)[kMmaM][4],
                              const Acc<kMmaM, kMmaN>& p, const Acc<kMmaM, kMmaN>& w, const SharedTile<M, kDim>& b,
                              int columns) {
  static_assert(M::kMmaK == 16, "of 16 bits");
  const uint32_t ones = M::pack(1.0f, 1.0f), even = (lane_index() >> 2 & 1) == 0 ? ones : 0, odd = ones - even;
#pragma unroll
  for (int k = 0; k < kMmaN / 2; ++k) {
    typename M::A of_p[kMmaM], of_w[kMmaM];
#pragma unroll
    for (int m = 0; m < kMmaM; ++m) {
      of_p[m] = rounded_a<M, kMmaN>(p[m], k);
      of_w[m] = rounded_a<M, kMmaN>(w[m], k);
      M::mma(sums[m], of_p[m], M::b(even, even));
      M::mma(sums[m], of_w[m], M::b(odd, odd));
    }
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      if (asks_for_columns<M, kDim>(n) && 16 * n >= columns) break;
      typename M::B right[2];
      load_b_transposed<M>(right, b, k * M::kMmaK, n, lane_index());
#pragma unroll
      for (int m = 0; m < kMmaM; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          M::mma(d[m][2 * n + i], of_p[m], right[i]);
          M::mma(e[m][2 * n + i], of_w[m], right[i]);
        }
    }
  }
}

// A warp's results, times factor[row], into rows first to first + 16 kMmaM of the tile.
template <class M, int kDim, int kMmaM>
ATTN_DEVICE void write_acc(const SharedTile<M, kDim>& tile, int first, const Acc<kMmaM, kDim / 8>& d,
                           const float (&factor)[kMmaM][2]) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
#pragma unroll
  for (int m = 0; m < kMmaM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float low = d[m][n][2 * half] * factor[m][half], high = d[m][n][2 * half + 1] * factor[m][half];
        auto* target = tile.at(first + 16 * m + 8 * half + g, 8 * n + 2 * t);
        if constexpr (M::kMmaK == 16) {
          *reinterpret_cast<uint32_t*>(target) = M::pack(low, high);
        } else {
          target[0] = low;
          target[1] = high;
        }
      }
}

}  // namespace attn_ops::cuda
