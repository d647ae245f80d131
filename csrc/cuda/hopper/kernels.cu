// The kernels for Hopper alone: one translation unit, compiled for sm_90a.
#include "forward.cuh"
#include "key_gradients.cuh"
#include "query_gradient.cuh"

namespace attn_ops::cuda::hopper {

#define FORWARD(math, M, dim)                                                                      \
  ATTN_KERNEL(attn_ops_hopper_forward_##math##_##dim, forward_shape(dim).threads(), ForwardArgs) { \
    forward<M, dim>(args);                                                                         \
  }

#define DQ(math, M, dim)                                                                               \
  ATTN_KERNEL(attn_ops_hopper_dq_##math##_##dim, backward_shape(dim, false).threads(), BackwardArgs) { \
    query_gradient<M, dim>(args);                                                                      \
  }
#define DKDV(math, M, dim)                                                                              \
  ATTN_KERNEL(attn_ops_hopper_dkdv_##math##_##dim, backward_shape(dim, true).threads(), BackwardArgs) { \
    key_gradients<M, dim>(args);                                                                        \
  }

#define FOR_ALL(KERNEL) KERNEL(f16, F16, 64) KERNEL(f16, F16, 128) KERNEL(bf16, BF16, 64) KERNEL(bf16, BF16, 128)

#ifdef ATTN_OPS_KERNELS  // those that a test runs (tests/cuda_host/ptx)
ATTN_OPS_KERNELS
#else
FOR_ALL(FORWARD) FORWARD(f16, F16, 256) FORWARD(bf16, BF16, 256) FOR_ALL(DQ) FOR_ALL(DKDV)
#endif

}  // namespace attn_ops::cuda::hopper
