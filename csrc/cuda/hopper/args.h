// The parameters of Hopper's kernels: those of the others, and maps for the copy engine.
#pragma once

#include "../args.h"

namespace attn_ops::cuda::hopper {

// A CUtensorMap of the driver: 4 dimensions (dim, heads, rows, batch), whose box has 64 elements of 16 bits (128 bytes)
// of the first.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

struct ForwardArgs {
  cuda::ForwardArgs call;
  TensorMap k, v;
};

struct BackwardArgs {
  cuda::BackwardArgs call;
  TensorMap q, d_out, k, v;
};

}  // namespace attn_ops::cuda::hopper
