// All kernels, instantiated: one translation unit, compiled once per architecture into one cubin. dispatch.cc knows
// their names.
#include "all_gradients.cuh"
#include "bias_gradient.cuh"
#include "decode.cuh"
#include "delta.cuh"
#include "distance_gradient.cuh"
#include "forward.cuh"
#include "sink_gradient.cuh"

namespace attn_ops::cuda {

#define FORWARD(math, M, dim)                                                                               \
  ATTN_KERNEL(attn_ops_forward_##math##_##dim, forward_tile(M::kMath, dim, false).threads(), ForwardArgs) { \
    forward<M, dim, false>(args);                                                                           \
  }
#define FORWARD_PLAIN(math, M, dim)                                                                                \
  ATTN_KERNEL(attn_ops_forward_##math##_##dim##_plain, forward_tile(M::kMath, dim, true).threads(), ForwardArgs) { \
    forward<M, dim, true>(args);                                                                                   \
  }

#define FOR_EACH_DIM(KERNEL, math, M) \
  KERNEL(math, M, 64) KERNEL(math, M, 96) KERNEL(math, M, 128) KERNEL(math, M, 192) KERNEL(math, M, 256)
#define FOR_16_BITS(KERNEL) FOR_EACH_DIM(KERNEL, f16, F16) FOR_EACH_DIM(KERNEL, bf16, BF16)
#define FOR_EXACT(KERNEL) FOR_16_BITS(KERNEL) FOR_EACH_DIM(KERNEL, f32, F32)
// has_tf32() of config.h
#define FOR_ALL(KERNEL) FOR_EXACT(KERNEL) KERNEL(tf32, TF32, 64) KERNEL(tf32, TF32, 96) KERNEL(tf32, TF32, 128)

#define BACKWARD(name, function, math, M, dim, plain, queries_stay)                              \
  ATTN_KERNEL(name, backward_tile(M::kMath, dim, plain, queries_stay).threads(), BackwardArgs) { \
    function<M, dim, plain>(args);                                                               \
  }
#define DQ(math, M, dim) BACKWARD(attn_ops_dq_##math##_##dim, query_gradient, math, M, dim, false, true)
#define DQ_PLAIN(math, M, dim) BACKWARD(attn_ops_dq_##math##_##dim##_plain, query_gradient, math, M, dim, true, true)
#define DKDV(math, M, dim) BACKWARD(attn_ops_dkdv_##math##_##dim, key_gradients, math, M, dim, false, false)
#define DKDV_PLAIN(math, M, dim) \
  BACKWARD(attn_ops_dkdv_##math##_##dim##_plain, key_gradients, math, M, dim, true, false)
#define DQKV(math, M, dim) BACKWARD(attn_ops_dqkv_##math##_##dim, all_gradients, math, M, dim, false, false)
#define DQKV_PLAIN(math, M, dim) \
  BACKWARD(attn_ops_dqkv_##math##_##dim##_plain, all_gradients, math, M, dim, true, false)

#define DECODE(math, M, dim) \
  ATTN_KERNEL(attn_ops_decode_##math##_##dim, 32 * kDecodeWarps, DecodeArgs) { decode<M, dim>(args); }
#define DECODE_OF_F16(math, M, dim) \
  ATTN_KERNEL(attn_ops_decode_of_f16_##math##_##dim, 32 * kDecodeWarps, DecodeArgs) { decode<M, dim, F16>(args); }
#define DECODE_OF_BF16(math, M, dim) \
  ATTN_KERNEL(attn_ops_decode_of_bf16_##math##_##dim, 32 * kDecodeWarps, DecodeArgs) { decode<M, dim, BF16>(args); }
#define DBIAS(math, M, dim)                                                                                       \
  ATTN_KERNEL(attn_ops_dbias_##math##_##dim, backward_tile(M::kMath, dim, false, true).threads(), BackwardArgs) { \
    bias_gradient<M, dim>(args);                                                                                  \
  }
#define DTABLE(math, M, dim)                                                                                       \
  ATTN_KERNEL(attn_ops_dtable_##math##_##dim, backward_tile(M::kMath, dim, false, true).threads(), BackwardArgs) { \
    distance_gradient<M, dim>(args);                                                                               \
  }
#define DELTA \
  ATTN_KERNEL(attn_ops_delta_f32, 32 * kDeltaWarps, BackwardArgs) { row_delta(args); }
#define DSINKS \
  ATTN_KERNEL(attn_ops_dsinks_f32, kSinkThreads, BackwardArgs) { sink_gradient(args); }
#define DTABLE_SUM \
  ATTN_KERNEL(attn_ops_dtable_sum_f32, kTableThreads, BackwardArgs) { sum_tables(args); }

#ifdef ATTN_OPS_KERNELS  // those that a test runs (tests/cuda_host/ptx): all of them take a minute and a half
ATTN_OPS_KERNELS
#else
FOR_ALL(FORWARD)
FOR_ALL(FORWARD_PLAIN)
FOR_ALL(DQ)
FOR_ALL(DQ_PLAIN)
FOR_ALL(DKDV)
FOR_ALL(DKDV_PLAIN)
DQKV(f32, F32, 64)  // makes_all_gradients() of config.h
DQKV_PLAIN(f32, F32, 64)
FOR_EXACT(DECODE)
FOR_EACH_DIM(DECODE_OF_F16, f32, F32)
FOR_EACH_DIM(DECODE_OF_BF16, f32, F32)
FOR_ALL(DBIAS)
FOR_ALL(DTABLE)
DELTA
DSINKS
DTABLE_SUM
#endif

}  // namespace attn_ops::cuda
