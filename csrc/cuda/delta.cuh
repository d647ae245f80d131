// delta = rowsum(d_out * out) - d_lse: where `out` is exact, rowsum(p dp) - d_lse. Of an output with 8 or 11 bits it is
// not: there the kernels of dq sum p dp themselves, and at the most begin with this (query_gradient.cuh).
#pragma once

#include "math.cuh"
#include "rows.cuh"

namespace attn_ops::cuda {

// rowsum(d_out * out) of the warp's row r, which is a quad's. All loads of rows that are aligned are under way at once:
// a block has nothing else to do before it knows.
template <class M, int kDim>
ATTN_DEVICE float output_product(const QueryRows<const uint16_t>& out, const QueryRows<const uint16_t>& d_out, int r,
                                 int dim) {
  const int t = lane_index() & 3;
  float sum = 0.0f;
  if (out.exists(r) && out.aligned == 16 && d_out.aligned == 16) {
    const auto* x = reinterpret_cast<const Bytes16*>(out.row(r)) + t;
    const auto* y = reinterpret_cast<const Bytes16*>(d_out.row(r)) + t;
    const int chunks = dim / 8 - t;
    Bytes16 left[kDim / 32], right[kDim / 32];
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c) {
      left[c] = 4 * c < chunks ? x[4 * c] : Bytes16{};
      right[c] = 4 * c < chunks ? y[4 * c] : Bytes16{};
    }
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum += M::low(left[c].word[i]) * M::low(right[c].word[i]);
        sum += M::high(left[c].word[i]) * M::high(right[c].word[i]);
      }
  } else if (out.exists(r)) {
    const uint16_t *x = out.row(r), *y = d_out.row(r);
#pragma unroll 1
    for (int d = t; d < dim; d += 4) sum += M::to_float(x[d * out.dim_stride]) * M::to_float(y[d * d_out.dim_stride]);
  }
  sum_of_quad(sum);
  return sum;
}

// Of numbers that are not negative. In 64 bits it would take longer than the row's products.
ATTN_DEVICE int64_t quotient(int64_t x, int64_t y) {
  return (x | y) >> 32 == 0 ? static_cast<uint32_t>(x) / static_cast<uint32_t>(y) : x / y;
}

// Of float32: one warp for each row of each head.
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
