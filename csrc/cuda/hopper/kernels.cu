// The kernels for Hopper alone: one translation unit, compiled for sm_90a.
#include "forward.cuh"

namespace attn_ops::cuda::hopper {

#define FORWARD(math, M, dim) \
  ATTN_KERNEL(attn_ops_hopper_forward_##math##_##dim, kThreads, ForwardArgs) { forward<M, dim>(args); }

FORWARD(f16, F16, 64)
FORWARD(f16, F16, 128)
FORWARD(bf16, BF16, 64)
FORWARD(bf16, BF16, 128)

}  // namespace attn_ops::cuda::hopper
