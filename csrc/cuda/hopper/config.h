// Which kernels Hopper has of its own, and the shape of their tiles: read by the kernels and by dispatch.cc.
#pragma once

#include "../config.h"

namespace attn_ops::cuda::hopper {

// Head dimensions are padded to one of these: what lies beyond an array arrives as zeros. Backward has the first two.
constexpr int kDims[] = {64, 128, 256};
constexpr int kLargestBackwardDim = 128;

constexpr int kPanelColumns = 64;  // of 16 bits: the 128 bytes that a swizzle goes over
constexpr int kAlignment = 1024;   // of tiles in shared memory
constexpr int kWarpgroup = 128, kWarpgroupRows = 64;

// One warpgroup copies, `consumers` compute, each of them 64 rows of the block's tile of block_m(); what passes does so
// block_n at a time, in a ring of `stages`. A thread of the first has `producer` registers, of the others `consumer`: of
// 65,536 together, which are shared out evenly when a block starts.
struct Shape {
  int consumers, block_n, stages, producer, consumer;

  constexpr int threads() const { return (1 + consumers) * kWarpgroup; }
  constexpr int block_m() const { return consumers * kWarpgroupRows; }
  constexpr bool fits() const { return (producer + consumers * consumer) * kWarpgroup <= 65536; }
};

constexpr Shape forward_shape(int dim) { return {2, dim <= 128 ? 128 : 64, 2, 24, 240}; }
constexpr int forward_shared_bytes(int dim) {
  const Shape s = forward_shape(dim);
  return kAlignment + 2 * dim * (s.block_m() + 2 * s.stages * s.block_n) + 256 + s.block_n;  // barriers, flags
}

// Where keys stay, one of the warps that do not compute tells what is known of the rows that pass.
constexpr Shape backward_shape(int dim, bool keys_stay) {
  return {2, dim == 64 ? 96 : 64, 3, keys_stay ? 40 : 24, keys_stay ? 232 : 240};
}
constexpr int backward_shared_bytes(int dim) {
  const Shape s = backward_shape(dim, true);
  const int told = s.block_n * 24 + 16;  // StreamedRows (backward.cuh)
  return kAlignment + 4 * dim * (s.block_m() + s.stages * s.block_n) + 128 + 2 * s.block_n + s.stages * told;
}
constexpr int kMostSharedBytes = 227 * 1024;  // that a block can have there
static_assert(forward_shared_bytes(256) <= kMostSharedBytes && backward_shared_bytes(128) <= kMostSharedBytes,
              "more than Hopper has");
static_assert(forward_shape(64).fits() && backward_shape(64, true).fits() && backward_shape(64, false).fits(),
              "setmaxnreg would wait for ever");

}  // namespace attn_ops::cuda::hopper
