// Which kernels there are, and the shape of their tiles: read by the kernels (kernels.cu), which are made from it, and
// by dispatch.cc, which launches them by name.
#pragma once

#include "../attention.h"

namespace attn_ops::cuda {

// How numbers are multiplied. kFloat32 takes three TF32 products for one (3xTF32), kTf32 takes one.
enum class Math : int32_t { kFloat16, kBFloat16, kFloat32, kTf32 };
constexpr int kNumMaths = 4;
constexpr const char* kMathNames[kNumMaths] = {"f16", "bf16", "f32", "tf32"};

// Head dimensions are padded to one of these. (The larger of head_dim and value_dim counts.)
constexpr int kNumDims = 5;
constexpr int kDims[kNumDims] = {64, 96, 128, 192, 256};
constexpr int kLargestDim = 256;

constexpr int element_bytes(Math m) { return m == Math::kFloat16 || m == Math::kBFloat16 ? 2 : 4; }

// What every card from Ampere on can lend one block (sm_86, sm_89 and sm_120 have the least).
constexpr int kLargestSharedBytes = 99 * 1024;

// A block of `warps` warps keeps block_m rows in shared memory, query rows or (for dk, dv) keys, and streams the other
// side past them, block_n at a time: its tile of scores is block_m x block_n.
struct Tile {
  int block_m, block_n, warps;
  constexpr int threads() const { return 32 * warps; }
};

// Forward: query rows stay, keys and values pass. A warp with 32 rows reads each key and value half as often as one
// with 16, but has registers for it only where there are no masks, biases and dropout to think of (`plain`).
constexpr Tile forward_tile(Math m, int dim, bool plain) {
  if (element_bytes(m) == 4) return dim <= 96 ? Tile{64, 64, 4} : dim <= 192 ? Tile{64, 32, 4} : Tile{64, 16, 4};
  if (dim > 192) return {64, plain ? 64 : 32, 4};
  if (!plain) return {64, 64, 4};
  return dim <= 96 ? Tile{128, 64, 4} : dim <= 128 ? Tile{128, 32, 4} : Tile{128, 64, 8};
}
constexpr int forward_shared_bytes(Math m, int dim, bool plain) {
  const Tile t = forward_tile(m, dim, plain);
  return (t.block_m + 2 * t.block_n) * dim * element_bytes(m) + 64;
}

// Larger heads are exact, since their backward has no registers for TF32, and so is decode. What forward was computed
// with, backward is: of other products, the statistics that forward left would be another row's.
constexpr bool has_tf32(int dim) { return dim <= 128; }

// Whether the kernel of dq makes delta, since what forward left of the output is not exact enough to make it from
// (delta.cuh).
constexpr bool sums_delta(Math m) { return m != Math::kFloat32; }

// Whether keys pass once in that kernel all the same, since there are registers for a second sum (query_gradient.cuh).
constexpr bool passes_once(Math m, int dim, bool plain) { return element_bytes(m) == 2 && dim <= (plain ? 192 : 128); }
// Whether a warp of the kernels of dq (queries_stay) or of dk and dv has what stays in registers throughout, as operands;
// it takes some of what passes at a time (keeps_operands of workarounds.cuh says where it cannot).
constexpr bool keeps_operands(Math m, int dim, bool plain, bool queries_stay) {
  if (element_bytes(m) != 2 || !plain || dim > 128) return false;
  return queries_stay || dim > 64;  // at 64 a warp has 32 keys
}

// Backward: queries and the gradient of the output stay and keys and values pass (dq), or the reverse (dk, dv).
constexpr Tile backward_tile(Math m, int dim, bool plain, bool queries_stay) {
  // Parts of ds: 32 columns spill on sm_120. Two sums of 192 columns: so do 32 keys, everywhere.
  if (element_bytes(m) == 2 && (dim > 192 || (plain && dim == 192 && queries_stay))) return Tile{64, 16, 4};
  if (element_bytes(m) == 2) {
    if (plain && dim <= 64) return queries_stay ? Tile{64, 64, 4} : Tile{128, 32, 4};
    return {64, 32, 4};
  }
  return dim <= 128 ? Tile{64, 32, 4} : Tile{32, 16, 2};
}
constexpr int backward_tiles_bytes(Math m, int dim, const Tile& t, int stages) {
  return 2 * (t.block_m + stages * t.block_n) * dim * element_bytes(m);
}
// What passes is fetched one tile ahead, unless so much memory would leave no room for a second block beside this one.
constexpr int backward_stages(Math m, int dim, const Tile& t) {
  return backward_tiles_bytes(m, dim, t, 2) <= kLargestSharedBytes * 3 / 4 ? 2 : 1;
}
// Where operands are kept, what stays needs no place any more once it is in registers: the second stage takes it.
constexpr bool second_stage_replaces(Math m, int dim, bool plain, bool queries_stay) {
  return keeps_operands(m, dim, plain, queries_stay) &&
         backward_stages(m, dim, backward_tile(m, dim, plain, queries_stay)) == 2;
}
// Of query rows that pass, what is told of each in each stage, and what is made of it for the tile at hand
// (StreamedRows). Three numbers; a fourth leaves them aligned, so that they are one load, without which heads of 256
// spilled (not plain: sm_80, sm_90a, 13.0), and with which two blocks of 64 would not share 100 KB (plain).
constexpr int told_numbers(bool plain) { return plain ? 3 : 4; }
constexpr int told_rows_bytes(int rows, bool plain) { return 4 * told_numbers(plain) * rows; }
constexpr int finished_rows_bytes(int rows) { return 6 * rows + 16; }

// What of the tiles and of what is told of rows needs a place of its own; what is made of that, and a flag of each row.
constexpr int backward_shared_bytes(Math m, int dim, bool plain, bool queries_stay) {
  const Tile t = backward_tile(m, dim, plain, queries_stay);
  const int stages = second_stage_replaces(m, dim, plain, queries_stay) ? 1 : backward_stages(m, dim, t);
  const int of_rows = queries_stay ? 0 : stages * told_rows_bytes(t.block_n, plain) + finished_rows_bytes(t.block_n);
  return backward_tiles_bytes(m, dim, t, stages) + of_rows + t.block_n;
}
// Two gradients of this many columns do not fit the registers: dk and dv are then made by blocks of their own.
constexpr bool splits_dk_dv(Math m, int dim) { return dim > (element_bytes(m) == 2 ? 128 : 96); }

// Whether there is a kernel that makes all three gradients, for small calls: where delta is known before, of the head
// dims that small models have.
constexpr bool makes_all_gradients(Math m, int dim) { return m == Math::kFloat32 && dim == 64; }

// Decode: few query rows; each warp streams its own keys and values through a ring of tiles.
constexpr int kDecodeRows = 16;
constexpr int kDecodeWarps = 4;
constexpr int kMostDecodeRows = 64;  // of a key/value head: more are the forward's (library.h can set another)
constexpr int decode_keys(Math m) { return element_bytes(m) == 2 ? 16 : 8; }  // of one tile of one warp
constexpr int decode_tile_bytes(int dim) { return 32 * dim; }
constexpr int decode_query_bytes(Math m, int dim) { return kDecodeRows * dim * element_bytes(m); }
// Keys and values of 16 bits beside queries of float32 pass as they are, and are made float32 in a tile of each warp's.
constexpr int decode_kept_bytes(int dim, bool narrow) { return decode_tile_bytes(dim) / (narrow ? 2 : 1); }
constexpr int decode_wide_bytes(int dim, bool narrow) { return narrow ? decode_tile_bytes(dim) : 0; }
constexpr int kDecodeStatisticsBytes = 1024;  // of each row and warp, and of each row, a maximum and a sum; and flags
constexpr int kMostSplits = 128;  // parts of a tile's keys
// A row of output on its way from one block to another: in fours of float32, one even without values.
constexpr int64_t decode_quads(int64_t value_dim) { return value_dim <= 4 ? 1 : (value_dim + 3) / 4; }
constexpr int decode_ring(Math m, int dim, bool narrow) {
  const int room = kLargestSharedBytes - decode_query_bytes(m, dim) - kDecodeStatisticsBytes;
  const int fit = (room / kDecodeWarps - decode_wide_bytes(dim, narrow)) / decode_kept_bytes(dim, narrow);
  return fit < 8 ? fit : 8;
}
constexpr int decode_warp_bytes(Math m, int dim, bool narrow) {
  return decode_wide_bytes(dim, narrow) + decode_ring(m, dim, narrow) * decode_kept_bytes(dim, narrow);
}
constexpr int decode_shared_bytes(Math m, int dim, bool narrow) {
  return kDecodeWarps * decode_warp_bytes(m, dim, narrow) + decode_query_bytes(m, dim) + kDecodeStatisticsBytes;
}

// Rows of the gradient of the output per block of the kernel that prepares the backward of float32.
constexpr int kDeltaWarps = 8;

// Of the block of each head that makes the gradient of its sink.
constexpr int kSinkThreads = 512;
constexpr int kSinkSharedBytes = kSinkThreads / 32 * 4;

// Of the gradient of relative_bias: how many blocks the 2 reach + 1 distances of a head are, and the most parts that a
// head's rows are cut into; the threads of a block of the kernel that adds the parts up.
constexpr int64_t distance_tiles(int64_t reach, int threads) { return (2 * reach + threads) / threads; }
constexpr int kMostTableParts = 16;
constexpr int kTableThreads = 256;

}  // namespace attn_ops::cuda
