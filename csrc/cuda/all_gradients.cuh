// dq, dk and dv by one launch, for calls whose blocks do not fill the card (joins_gradients of plan.h): some of the
// blocks do what those of key_gradients.cuh do, the others what those of query_gradient.cuh do. None waits for another,
// so delta must be known before (delta.cuh), which in 16 bits it is not.
#pragma once

#include "key_gradients.cuh"
#include "query_gradient.cuh"

namespace attn_ops::cuda {

template <class M, int kDim, bool kPlain>
ATTN_DEVICE void all_gradients(const BackwardArgs& args) {
  static_assert(!sums_delta(M::kMath), "dk and dv need what dq leaves");
  static_assert(BackwardShape<M, kDim, kPlain, true>::kThreads == BackwardShape<M, kDim, kPlain, false>::kThreads, "");
  // Those of dk and dv take longer: they begin first.
  if (block_index() < args.key_blocks) {
    key_gradients<M, kDim, kPlain>(args);
  } else {
    query_gradient<M, kDim, kPlain>(args, [&] { return block_index() - args.key_blocks; });
  }
}

}  // namespace attn_ops::cuda
