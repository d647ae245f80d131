// delta = rowsum(d_out * out) - d_lse, one warp for each row of each head: where `out` is exact, rowsum(p dp) - d_lse.
//
// Of an output with 8 or 11 bits it is not. Where keys have a large number in common, ds must cancel to the last bit of
// p and dp, so there the kernel of dq sums these themselves (query_gradient.cuh).
#pragma once

#include "args.h"
#include "math.cuh"

namespace attn_ops::cuda {

// Of numbers that are not negative. In 64 bits it would take longer than the row's products.
ATTN_DEVICE int64_t quotient(int64_t x, int64_t y) {
  return (x | y) >> 32 == 0 ? static_cast<uint32_t>(x) / static_cast<uint32_t>(y) : x / y;
}

ATTN_DEVICE void row_delta(const BackwardArgs& args) {
  constexpr int kPerChunk = 4;
  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const int64_t index = int64_t{block_index()} * kDeltaWarps + warp_index();
  if (index >= p.batch * p.num_heads * p.seqlen_q) return;
  // Neighbouring warps take the heads of one position, which lie side by side in BSHD.
  const int64_t line = quotient(index, p.num_heads), head = index - line * p.num_heads;
  const int64_t batch = quotient(line, p.seqlen_q), position = line - batch * p.seqlen_q;
  const auto row = [=](const StridedView& view) {
    return static_cast<const float*>(view.data) + batch * view.stride[0] + position * view.stride[1] +
           head * view.stride[2];
  };
  const float *out = row(p.out), *d_out = row(b.d_out);
  const int dim = static_cast<int>(p.value_dim);
  float sum = 0.0f;
  if (args.aligned.out == 16 && args.aligned.d_out == 16) {
    for (int d = lane_index() * kPerChunk; d < dim; d += 32 * kPerChunk) {
      const Bytes16 x = *reinterpret_cast<const Bytes16*>(out + d), y = *reinterpret_cast<const Bytes16*>(d_out + d);
#pragma unroll
      for (int i = 0; i < kPerChunk; ++i) sum += float_of(x.word[i]) * float_of(y.word[i]);
    }
  } else {
    for (int d = lane_index(); d < dim; d += 32) sum += out[d * p.out.stride[3]] * d_out[d * b.d_out.stride[3]];
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane_index() != 0) return;
  const int64_t statistic = (batch * p.num_heads + head) * p.seqlen_q + position;
  args.delta[statistic] = sum - (b.d_lse == nullptr ? 0.0f : static_cast<const float*>(b.d_lse)[statistic]);
}

}  // namespace attn_ops::cuda
