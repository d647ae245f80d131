// All kernels, instantiated: one translation unit, compiled once per architecture into one cubin. dispatch.cc knows their
// names.
#include "forward.cuh"

namespace attn_ops {
namespace cuda {

#define FORWARD(math, M, dim)                                                            \
  ATTN_KERNEL(attn_ops_forward_##math##_##dim, forward_tile(M::kMath, dim, false).threads(), ForwardArgs) { \
    forward<M, dim, false>(args);                                                        \
  }
#define FORWARD_PLAIN(math, M, dim)                                                              \
  ATTN_KERNEL(attn_ops_forward_##math##_##dim##_plain, forward_tile(M::kMath, dim, true).threads(), ForwardArgs) { \
    forward<M, dim, true>(args);                                                                 \
  }

#define FOR_EACH_DIM(KERNEL, math, M) KERNEL(math, M, 64) KERNEL(math, M, 96) KERNEL(math, M, 128) KERNEL(math, M, 192) KERNEL(math, M, 256)
#define FOR_16_BITS(KERNEL) FOR_EACH_DIM(KERNEL, f16, F16) FOR_EACH_DIM(KERNEL, bf16, BF16)
#define FOR_EXACT(KERNEL) FOR_16_BITS(KERNEL) FOR_EACH_DIM(KERNEL, f32, F32)
#define FOR_ALL(KERNEL) FOR_EXACT(KERNEL) FOR_EACH_DIM(KERNEL, tf32, TF32)

FOR_ALL(FORWARD)
FOR_16_BITS(FORWARD_PLAIN)

}  // namespace cuda
}  // namespace attn_ops
