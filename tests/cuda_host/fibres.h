// Runs the blocks of a kernel on the calling host thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "host_layer.h"

namespace attn_ops {
namespace cuda {
namespace host_layer {

constexpr int kWarpLanes = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kMostSharedBytes = 227 * 1024;

const Kernel* find_kernel(const char* name);

// What the kernel did that it must not do, "" if nothing. Nothing of the grid runs any more after that.
//
// Blocks, and the warps and lanes in them, run in an order made from ATTN_OPS_HOST_LAYER_SEED (default 1), so that what
// waits for too little meets another order than the one it happens to need. 0: the natural order.
std::string run_grid(const Kernel&, const void* args, int64_t blocks, size_t shared_bytes);

// What lies at a bad address, for the message; "" if unknown. Set by the driver.
extern std::string (*describe_address)(const void*);

}  // namespace host_layer
}  // namespace cuda
}  // namespace attn_ops
