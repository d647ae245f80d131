// Which kernels Hopper has of its own, and the shape of their tiles: read by the kernels and by dispatch.cc.
#pragma once

#include "../config.h"

namespace attn_ops::cuda::hopper {

// Head dimensions are padded to one of these: what lies beyond an array arrives as zeros.
constexpr int kNumDims = 2;
constexpr int kDims[kNumDims] = {64, 128};

constexpr int kPanelColumns = 64;  // of 16 bits: the 128 bytes that a swizzle goes over
constexpr int kAlignment = 1024;   // of tiles in shared memory

// One warpgroup copies and two compute, each of them 64 rows of the block's tile.
constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kWarpgroupRows = 64;

struct Forward {
  static constexpr int kBlockM = kConsumers * kWarpgroupRows, kBlockN = 128, kStages = 2;
};
constexpr int forward_shared_bytes(int dim) {
  const int barriers_and_flags = 256 + Forward::kBlockN;
  return kAlignment + 2 * dim * (Forward::kBlockM + 2 * Forward::kStages * Forward::kBlockN) + barriers_and_flags;
}

}  // namespace attn_ops::cuda::hopper
