// The gradient of the sinks, a block for each head:
//
//   p = e^(sink - m) / l      d_sink = sum p (0 - delta)
//
// over all rows of the head, from what forward and the kernel of delta have left of them. A thread sums every
// kSinkThreads-th row, and the threads' sums are added up in their order: the same bits every time.
#pragma once

#include "backward.cuh"

namespace attn_ops::cuda {

ATTN_DEVICE void sink_gradient(const BackwardArgs& args) {
  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const float* d_lse = static_cast<const float*>(b.d_lse);
  const int head = block_index();
  const float sink = static_cast<const float*>(p.sinks)[head];
  const bool is_sink = sink > minus_infinity();  // as join_sink has it
  float sum = 0.0f;
#pragma unroll 1
  for (int batch = 0; is_sink && batch < p.batch; ++batch) {
    const int length = p.query_lengths == nullptr ? static_cast<int>(p.seqlen_q) : p.query_lengths[batch];
    const int64_t first = (batch * p.num_heads + head) * p.seqlen_q;
#pragma unroll 1
    for (int64_t position = thread_index(); position < p.seqlen_q; position += kSinkThreads) {
      const int64_t i = first + position;
      const float known = position < length ? args.delta[i] : 0.0f;  // delta is not made of rows past the last
      const RowGradient row(p, i, known);
      if (row.inverse_sum == 0.0f) continue;
      const float weight = row.weight_of_sink(p, head);
      // A row that the sink has alone weighs no value, whatever is in d_out there.
      const bool alone = weight == 1.0f && (position >= length || !is_finite(row.delta));
      sum -= weight * (!alone ? row.delta : d_lse == nullptr ? 0.0f : -d_lse[i]);
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  float* sums = reinterpret_cast<float*>(shared_memory());  // of each warp
  if (lane_index() == 0) sums[warp_index()] = sum;
  sync_block();
  if (thread_index() != 0) return;
  float total = 0.0f;
  for (int warp = 0; warp < kSinkThreads / 32; ++warp) total += sums[warp];
  static_cast<float*>(b.d_sinks)[head] = total;
}

}  // namespace attn_ops::cuda
