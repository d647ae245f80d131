// How a block's warpgroups work together: one copies, the others compute, and a ring of tiles is between them.
#pragma once

#include "../rows.cuh"
#include "tiles.cuh"

namespace attn_ops::cuda::hopper {

// Where a ring of tiles stands at its i-th.
template <int kStages>
struct Turn {
  int stage;
  uint32_t parity;
  ATTN_DEVICE explicit Turn(int i) : stage(i % kStages), parity(i / kStages & 1) {}
};

// The barriers of the block that are not in shared memory.
enum BarrierId : int { kOfConsumers = 1, kOfConsumer = 2, kTurns = 5 };  // the last two: one for each of up to three

// By each warp that computes: it is done with a tile.
ATTN_DEVICE void release(Barrier empty) {
  sync_warp();
  if (lane_index() == 0) empty.arrive();
}

// Tiles of kN keys or rows, of those from `begin` to below `end`.
template <int kN>
struct Tiles {
  int begin, count;

  ATTN_DEVICE Tiles(int begin, int end)
      : begin(round_down(begin, kN)), count(begin < end ? (end - this->begin + kN - 1) / kN : 0) {}
  ATTN_DEVICE int first(int i) const { return begin + i * kN; }
};

}  // namespace attn_ops::cuda::hopper
